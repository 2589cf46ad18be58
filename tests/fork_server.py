"""Programs as forks of a process that has imported them: `python -m tests.fork_server SOCKET`.

A new interpreter needs 3 s of CPU time to import what a training process imports; a fork needs a
hundredth of it. torchrun's ranks too are forks, of torchrun itself, which keeps them its children.
Each process has its own process id, environment (in /proc as well), descriptors, signals, exit
code. What a fork does not have: its own seed of `hash()`, and, for a rank, the end of the
interpreter after its exit handlers. See `tests/forked.py` for the other side.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

PRELOAD = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.run",
    "torch.nn.parallel",
    "torch.profiler",
    "torch.utils.tensorboard",
    "accelerate.tracking",
    "dmoe.cli.main",
    "dmoe.train.run",
    "pydantic.json_schema",
    "typer._adapters",
)
MAX_REQUEST = 1 << 20
ROOM = "DMOE_TEST_ROOM"
"""Variable of this process that makes room for the environment of a fork."""
NEW_RANKS = "DMOE_TEST_NEW_RANKS"
"""Variable of a torchrun whose ranks are to be new interpreters."""
CLONE_NEWNET = 0x40000000  # from <linux/sched.h>
LAUNCHER = "torch.distributed.run"
RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
RANK_STARTER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"


def main() -> None:
    """Import, then start a program per request, and report how each has ended."""
    for name in PRELOAD:
        import_module(name)
    # else each collection in a fork copies the pages of all these objects
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    ends: dict[int, tuple[int, int]] = {}
    while True:
        ready, _, _ = select.select([requests, *ends], [], [])
        for descriptor in ready:
            if descriptor is not requests:
                pid, report = ends.pop(descriptor)
                _report_end(pid, report)
                os.close(descriptor)
        if requests in ready:
            message, files, _, _ = socket.recv_fds(requests, MAX_REQUEST, 4)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                requests.detach()
                # returns to the end of the interpreter, as a program of its own
                _become(json.loads(message), files[:3])
                return
            for descriptor in files[:3]:
                os.close(descriptor)
            ends[os.pidfd_open(pid)] = (pid, files[3])
            requests.send(str(pid).encode())


def _report_end(pid: int, report: int) -> None:
    status = os.waitpid(pid, 0)[1]
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(report, str(status).encode())
    os.close(report)


class _RankProcess(subprocess.Popen[bytes]):
    """Rank that torchrun starts: a fork of torchrun in place of a new interpreter."""

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        # as subprocess passes them: six descriptors are the ends of up to three pipes
        cwd, env, pipes = rest[4], rest[5], rest[9:15]
        given = (pipes[0], pipes[3], pipes[5])
        files = [n if number < 0 else number for n, number in enumerate(given)]
        assert list(args[1:3]) == ["-u", "-m"], f"not a Python module: {args}"
        self.pid = os.fork()
        if self.pid == 0:
            request = {"module": args[3], "arguments": args[4:], "cwd": cwd or os.getcwd()}
            _end(request | {"env": env, "session": True, "unbuffered": True, "network": ""}, files)
        self._child_created = True


def _end(request: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """Run a program on the stack of its parent, and leave without returning to it."""
    code = 1
    try:
        # handlers of the parent would remove its directories
        util._finalizer_registry.clear()
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        atexit._clear()
        for handler in (logging.shutdown, util._exit_function, weakref.finalize._exitfunc):
            atexit.register(handler)
        _become(request, files)
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, int) or ended.code is None:
            code = ended.code or 0
        else:
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    """Take over what a new process would get from its parent, and run the module."""
    # nothing of the parent is ever freed here: destructors would wait for threads that are not here
    gc.freeze()
    if request["session"]:
        os.setsid()
    _take_files(files)
    _take_environment(request["env"])
    if request["network"]:
        _enter_network(request["network"])
    os.chdir(request["cwd"])
    _reset_signals()
    random.seed()
    import_module("numpy.random").seed()
    tempfile.tempdir = None
    if request["unbuffered"]:
        for file in (sys.stdout, sys.stderr):
            file.reconfigure(write_through=True)  # type: ignore[union-attr]
    if request["module"] == LAUNCHER and NEW_RANKS not in request["env"]:
        import_module(RANK_STARTER).Popen = _RankProcess  # type: ignore[attr-defined]
    if request["module"] == LAUNCHER:
        # the name of a line of its log, from all frames and modules: a second of CPU time
        import_module(RENDEZVOUS).get_method_name = lambda: ""  # type: ignore[attr-defined]
    sys.modules.pop(request["module"], None)
    sys.path[0] = request["cwd"]
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _enter_network(name: str) -> None:
    """Move to a network namespace, as `ip netns exec` does: of a process that has one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", name).open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns to {name} failed")


def _take_files(files: Sequence[int]) -> None:
    copies = [os.dup(number) for number in files]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    os.closerange(3, 1 << 16)


def _take_environment(env: dict[str, str]) -> None:
    """Replace the environment, also in /proc/PID/environ."""
    os.environ.clear()
    os.environ.update(env)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    text = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())
    assert len(text) < end - start, f"{ROOM} is too small"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main()
