"""`ForkedProcess`: a Python program that starts as a fork of `tests/fork_server.py`, in 0.1 s.

For tests that start many processes and examine what the processes do. The start itself (what is
imported when, what an interpreter reads from its environment) is for real interpreters.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.fork_server import ROOM

ROOT = Path(__file__).parent.parent
AT_IMPORT = (
    "PYTHON",
    "OMP_",
    "MKL_",
    "CUDA_",
    "TORCH_",
    "LD_",
    "MALLOC_",
    "GLIBC_",
    "HF_",
    "WANDB_",
)
"""Variables that are read when a process starts, or when it imports: a fork would not see them."""
READ_LATER = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
"""Those of torchrun that it reads at each start: no reason for another fork server."""


class _Server:
    """One fork server per test process and environment of its imports; ends with the process."""

    def __init__(self, at_import: Mapping[str, str]) -> None:
        self.lock = threading.Lock()
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = {name: value for name, value in os.environ.items() if not _is_read_early(name)}
        subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env=kept | at_import | {ROOM: " " * (1 << 16)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        atexit.register(self.requests.close)

    def start(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Start a program with these stdin, stdout, stderr and report of its end."""
        with self.lock:
            socket.send_fds(self.requests, [json.dumps(request).encode()], files)
            answer = self.requests.recv(32)
        assert answer, "the fork server has ended; its error is on stderr"
        return int(answer)


@cache
def _server(at_import: tuple[tuple[str, str], ...]) -> _Server:
    return _Server(dict(at_import))


def _is_read_early(name: str) -> bool:
    return name.startswith(AT_IMPORT) and name not in READ_LATER


class ForkedProcess(subprocess.Popen[str]):
    """`python -m MODULE ARGUMENTS`, as a `subprocess.Popen`, in a `network` of `ip netns`.

    Its parent is the fork server: of what needs a parent, only poll, wait and communicate work.
    """

    _end = -1

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        network: str = "",
    ) -> None:
        self._network = network
        super().__init__(
            [module, *arguments],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
        )

    def _execute_child(self, args: Sequence[str], *rest: Any) -> None:
        # as subprocess passes them: six descriptors are the ends of up to three pipes
        cwd, env, pipes = rest[4], rest[5], rest[9:15]
        stdin, _, _, stdout, _, stderr = pipes
        early = tuple(sorted(pair for pair in env.items() if _is_read_early(pair[0])))
        request = {"module": args[0], "arguments": list(args[1:]), "cwd": str(cwd), "env": env}
        self._end, report = os.pipe()
        files = [n if given < 0 else given for n, given in enumerate((stdin, stdout, stderr))]
        self.pid = _server(early).start(
            request | {"session": False, "unbuffered": False, "network": self._network},
            [*files, report],
        )
        os.close(report)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        timeout = 0.0 if wait_flags & os.WNOHANG else None
        if not select.select([self._end], [], [], timeout)[0]:
            return 0, 0
        status = os.read(self._end, 32)
        os.close(self._end)
        # without a report the server has died, and what it started is not to be trusted
        return self.pid, int(status or 9)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode
