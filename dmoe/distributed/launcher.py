"""Launch local ranks with torch's elastic launcher, and exit workers when their launcher dies.

`dmoe train --ranks N` is `torchrun --nproc-per-node N -m dmoe train`.

torch's elastic agent starts each worker in its own session. If the agent is killed with SIGKILL it
cannot stop them, and they keep training, holding ports, memory and the run directory. Linux can
send a process a signal when its parent dies (`man 2 prctl`, PR_SET_PDEATHSIG). The parent is the
*thread* that forked: the agent starts and restarts workers in its main thread (torch 2.11 to 2.13,
LocalElasticAgent._start_workers), so the end of that thread is the end of the launcher. The signal
survives exec; children of the worker do not inherit it.

Nothing is done outside Linux, nor without the elastic agent: Slurm ends its own steps. One gap
remains: a launcher that dies before the worker calls `exit_with_launcher` is noticed only if
the worker was reparented to process 1, not to a subreaper.
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

from dmoe.config.errors import ConfigError

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU)
"""A terminal that is closed sends HUP; LSF and SGE warn before a limit with USR2 or XCPU."""

_IN_LIBRARY = "a library has crashed: start it again with PYTHONFAULTHANDLER=1 to see where"
CRASHES = {
    -signal.SIGSEGV: _IN_LIBRARY,
    -signal.SIGABRT: _IN_LIBRARY,
    -signal.SIGILL: "a library was built for another processor: install it for this one",
    -signal.SIGBUS: "/dev/shm or the disk of a mapped file is full, or a file was cut short",
}
"""What ends a process without a word, by its exit code."""


def handled_stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: not those inherited as ignored, as HUP is under nohup.

    TERM is always among them: a scheduler has no other way to ask for an end.
    """
    return [
        number
        for number in STOP_SIGNALS
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN
    ]


def launch(num_ranks: int, arguments: list[str], port: int | None = None) -> int:
    """Run `python -m dmoe ARGUMENTS` on local ranks.

    The cores are divided equally between the ranks unless OMP_NUM_THREADS is set.

    Args:
        num_ranks: number of processes.
        arguments: command line of dmoe.
        port: rendezvous port; None takes a free one.

    Returns:
        0, or the exit code of the first rank that failed.

    Raises:
        ConfigError: the port is in use.
    """
    # Imported here: `exit_with_launcher` runs before torch is imported, `dmoe watch` without it.
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The failing rank has already printed its error in one line.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    rendezvous = ["--standalone"]
    if port is not None:
        rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    # torch's launcher would handle HUP even where nohup has it ignored
    forwarded = ",".join(number.name for number in [*handled_stop_signals(), signal.SIGQUIT])
    options = get_args_parser().parse_args(
        [
            *(*rendezvous, "--signals-to-handle", forwarded),
            *("--nproc-per-node", str(num_ranks), "-m", "dmoe", *arguments),
        ]
    )
    # torch's launcher would die of USR1.
    signal.signal(signal.SIGUSR1, _forward_signal)
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # It could say nothing itself.
        if failure.exitcode in (-signal.SIGKILL, *CRASHES):
            cause = CRASHES.get(
                failure.exitcode,
                "the kernel does so when main memory runs out (see dmesg): lower train.micro_batch",
            )
            name = signal.Signals(-failure.exitcode).name
            print(f"dmoe: rank {rank} was killed ({name}); {cause}", file=sys.stderr)
        return int(failure.exitcode) if failure.exitcode > 0 else 128 - int(failure.exitcode)
    # The signal was forwarded: the ranks have saved their step and ended.
    except SignalException as stop:
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
        # SIG_IGN stays in force until the process has ended; Python's own handlers do not.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # Clear the live panel, if rank 0 was killed before it could do so.
        if sys.stdout.isatty():
            print("\x1b[J", end="", flush=True)
    return 0


def _forward_signal(number: int, frame: FrameType | None) -> None:
    """Send the signal to the child processes that run dmoe (the others are torch's helpers)."""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"\0dmoe\0" in command and _handles_signal(pid, number):
                    os.kill(int(pid), number)


def _handles_signal(pid: str, number: int) -> bool:
    """Return True if the process catches or ignores the signal.

    One that is still starting, or already ending, would die of it.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return bool((int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16)) >> (number - 1) & 1)


def exit_with_launcher() -> None:
    """Ask the kernel to kill this process with its launcher, if that is torch's elastic agent.

    One system call. Call it early in the main program, before slow imports. Does not return if the
    launcher is already dead.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # If the launcher died before the call, no signal will come.
    if os.getppid() != launcher or (launcher == 1 and not _runs_python(1)):
        os.kill(os.getpid(), signal.SIGKILL)


def _runs_python(pid: int) -> bool:
    """Return True for a Python program: in a container the launcher itself can be process 1."""
    try:
        return "python" in Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:  # another user's process, so it did not start this one
        return False
