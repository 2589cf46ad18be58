"""The C library's allocator, told to keep freed memory for the next step.

glibc returns every block above 32 MiB to the system when it is freed, and the end of its heap too,
so each step page-faults its gradients and activations again: for 84 M parameters the gradients
alone cost 86 ms per step. Kept, a step reuses the pages of the last one. The process holds its peak
memory, which the next step needs anyway.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3): bytes free at the end of the heap that are returned; blocks that get a
mapping of their own."""


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, for a process that ends with its run.

    Does nothing, and returns False, without glibc, or where the environment sets its allocator
    (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    given = [name for name in os.environ if name.startswith("MALLOC_")]
    given += [name for name in ("GLIBC_TUNABLES", "LD_PRELOAD") if os.environ.get(name)]
    if given or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))
