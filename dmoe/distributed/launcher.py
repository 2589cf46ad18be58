"""N local ranks of this very command, by torch's elastic launcher: `dmoe train --ranks N` is `torchrun -m dmoe train`.

No orphans: a worker ends with the launcher that started it.

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
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from dmoe.config.errors import ConfigError


def launch(num_ranks: int, arguments: list[str], port: int | None = None) -> int:
    """Run `python -m dmoe ARGUMENTS` on `ranks` local processes and return the exit code of the first that failed, or 0.

    The cores are shared out evenly unless OMP_NUM_THREADS says otherwise. `port`: of the rendezvous; default a free one.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    logging.getLogger("torch.distributed").setLevel(
        logging.CRITICAL
    )  # the failing rank has said what is wrong, in one line
    where = (
        ["--standalone"]
        if port is None
        else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    )
    options = get_args_parser().parse_args(
        [*where, "--nproc-per-node", str(num_ranks), "-m", "dmoe", *arguments]
    )
    signal.signal(
        signal.SIGUSR1, _forward_signal
    )  # torch's launcher passes on TERM, INT, HUP and QUIT, and would die of this one
    try:
        run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode) if failure.exitcode > 0 else 128 - int(failure.exitcode)
    except SignalException as stop:  # passed on to the ranks, which have saved their step and left
        return 128 + int(stop.sigval)
    except DistNetworkError as error:
        if port is None or "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            "--port",
            port,
            "the port is in use",
            "leave --port out to get a free one, or name another",
        ) from None
    finally:
        signal.signal(
            signal.SIGUSR1, signal.SIG_IGN
        )  # it holds to the end of the process, where Python's own handlers do not
        if (
            sys.stdout.isatty()
        ):  # what is left of the live panel, where rank 0 was killed before it could clear it
            print("\x1b[J", end="", flush=True)
    return 0


def _forward_signal(number: int, frame: FrameType | None) -> None:
    """Send the signal to the ranks: this process's children, but for those that do not run dmoe (torch's own helpers)."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            with suppress(OSError):
                if b"\0dmoe\0" in Path(f"/proc/{child}/cmdline").read_bytes() and _handles_signal(
                    child, number
                ):
                    os.kill(int(child), number)


def _handles_signal(pid: str, number: int) -> bool:
    """Whether the process catches or ignores the signal: one that is starting still, or ending, would die of it."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool((int(lines["SigCgt"], 16) | int(lines["SigIgn"], 16)) >> (number - 1) & 1)


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
    if os.getppid() != launcher or (
        launcher == 1 and not _runs_python(1)
    ):  # it died before the call: no signal will come
        os.kill(os.getpid(), signal.SIGKILL)


def _runs_python(pid: int) -> bool:
    """Whether that process is a Python program: in a container the launcher itself can be process 1."""
    try:
        return "python" in Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:  # another user's process, so none that started us
        return False
