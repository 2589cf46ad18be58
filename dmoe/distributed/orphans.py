"""No orphans: a worker ends with the launcher that started it.

torch's elastic agent starts each worker in a session of its own. Killed with SIGKILL it cannot stop them, and they train on, unseen,
holding ports, memory and the run directory. Linux can send a process a signal when its parent dies (`man 2 prctl`,
PR_SET_PDEATHSIG). The parent is the *thread* that forked: the agent starts and restarts workers in its main thread (torch 2.11 to
2.13: LocalElasticAgent._start_workers, no thread in between), so that thread's end is the launcher's end. The signal survives exec
and is not passed on to children of the worker.

Elsewhere than on Linux nothing is done, and nothing without the elastic agent: Slurm ends its own steps. The remaining hole: a
launcher that dies before the worker gets here is noticed only if the orphan was handed to process 1 (and not to a "subreaper").
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

__all__ = ["exit_with_launcher"]

PR_SET_PDEATHSIG = 1


def exit_with_launcher() -> None:
    """Ask the kernel to kill this process with its launcher, if torch's elastic agent started it. One system call.

    Early in the main program, before anything slow is imported. Does not return if the launcher is dead already.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != launcher or (launcher == 1 and not _runs_python(1)):  # it died before the call: no signal will come
        os.kill(os.getpid(), signal.SIGKILL)


def _runs_python(pid: int) -> bool:
    """Whether that process is a Python program: in a container the launcher itself can be process 1."""
    try:
        return "python" in Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:  # another user's process, so none that started us
        return False
