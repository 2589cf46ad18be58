"""What the hardware of a rank gives at the best, and how much memory it took: the yardsticks of utilisation."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = {"cpu": 1024, "cuda": 4096}
"""Of a square product: large enough to be limited by arithmetic, small enough to take milliseconds."""
SECONDS = 0.15
STATUS = Path("/proc/self/status")


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of some square matrix products in the run's precision, measured for 0.15 s.

    A measured peak and not the one of a data sheet, which CPUs do not have and which GPUs do not hold under their power limit. On a
    CPU all ranks measure at the same time, as they train: cores that they share are shared here too.
    """
    size = WIDTH.get(device.type, WIDTH["cuda"])
    left, right = (torch.ones(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(left)
    best, began = 0.0, time.monotonic()
    while best == 0.0 or time.monotonic() - began < SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def used_memory(device: torch.device) -> int:
    """Bytes at the highest until now: of tensors on a GPU; of the whole process, Python and libraries included, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (
        STATUS.exists()
    ):  # Linux; getrusage there also knows what the process was before it started Python
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        highest = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if highest:
            return int(highest[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
