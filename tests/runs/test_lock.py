"""Run lock: a second job is refused, the lock of a dead one is taken over without cleaning up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dmoe.config.errors import ConfigError
from dmoe.runs.lock import LockOwner, RunLock, _start_ticks

HOLDER = """
import subprocess, sys
from pathlib import Path
from dmoe.runs.lock import RunLock

lock = RunLock.acquire(Path(sys.argv[1]), "job-a")
child = None
if sys.argv[2] == "child":  # inherits all descriptors that its parent does not close
    null = subprocess.DEVNULL
    child = subprocess.Popen(["sleep", "60"], stdin=null, stdout=null, close_fds=False)
print(child.pid if child else 0, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(run: Path, kind: str = "alone") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a process that holds the lock until its stdin ends; yield it and its child's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def write_owner(run: Path, **changes: Any) -> None:
    (run / "lock").write_text(
        json.dumps(asdict(replace(LockOwner.current(None), **changes))) + "\n", encoding="utf-8"
    )


def test_a_second_job_is_refused_with_the_owner_named(tmp_path: Path) -> None:
    with holder(tmp_path) as (first, _):
        line = json.loads((tmp_path / "lock").read_text(encoding="utf-8"))
        with pytest.raises(ConfigError) as refused:
            RunLock.acquire(tmp_path, "job-b")
        with pytest.raises(ConfigError):  # the same job is no excuse while the owner lives
            RunLock.acquire(tmp_path, "job-a")
    text = str(refused.value)
    assert refused.value.exit_code == 2
    assert refused.value.field == "train.run_dir"
    assert "\n" not in text
    for part in (line["host"], f"pid {first.pid}", line["started"], str(tmp_path)):
        assert part in text


def test_the_lock_of_a_killed_job_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as (first, _):
        first.kill()
        first.wait()
        with RunLock.acquire(tmp_path, None) as lock:
            assert lock.warning is None
            assert json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()


def test_a_child_that_outlives_the_job_does_not_hold_its_lock(tmp_path: Path) -> None:
    """An flock belongs to the open file: a helper process that inherits it keeps the lock."""
    with holder(tmp_path, "child") as (first, child):
        first.kill()
        first.wait()
        try:
            RunLock.acquire(tmp_path, None).release()
        finally:
            os.kill(
                child, signal.SIGKILL
            )  # fails if it has ended by itself: then nothing was tested


def test_a_released_lock_is_an_empty_file_and_free(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path, "job")
    lock.release()
    lock.release()
    assert (tmp_path / "lock").read_bytes() == b""
    RunLock.acquire(tmp_path, None).release()


def test_deleting_the_file_of_a_live_job_does_not_unlock(tmp_path: Path) -> None:
    """The refusal itself suggests deleting it, so the directory is locked too."""
    first = RunLock.acquire(tmp_path, None)
    (tmp_path / "lock").unlink()
    with pytest.raises(ConfigError, match="another job is at work"):
        RunLock.acquire(tmp_path, None)
    first.release()
    RunLock.acquire(tmp_path, None).release()


def test_an_owner_without_a_line_yet_still_counts(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="has not written its name"):
            RunLock.acquire(tmp_path, None)


def test_an_owner_on_another_host_is_refused_with_the_file_to_delete(tmp_path: Path) -> None:
    """A network file system may grant the lock on both hosts."""
    write_owner(tmp_path, host="elsewhere", boot="another", job="none")
    for named in (None, "none", "job-b"):
        with pytest.raises(
            ConfigError, match=r"host elsewhere.*; if that job is dead, delete .*/lock$"
        ):
            RunLock.acquire(tmp_path, named)
    assert json.loads((tmp_path / "lock").read_bytes())["host"] == "elsewhere"
    (tmp_path / "lock").unlink()
    RunLock.acquire(tmp_path, None).release()


def test_the_same_job_may_continue_on_another_host(tmp_path: Path) -> None:
    """The elastic launcher moves rank 0 when it loses a machine."""
    write_owner(tmp_path, host="elsewhere", boot="another", job="job-a")
    RunLock.acquire(tmp_path, "job-a").release()


def test_another_container_of_this_machine_is_not_another_host(tmp_path: Path) -> None:
    """A container has its own host name at each start, but the machine's kernel and locks."""
    owner = LockOwner.current(None)
    if not owner.boot:
        pytest.skip("this kernel does not tell one boot from another")
    write_owner(tmp_path, host="container-1", pid=owner.pid + 1)
    RunLock.acquire(tmp_path, None).release()


@pytest.mark.parametrize(
    "line", [b"", b'{"host": "elsew', b"[]", b"\xff\xfe", b'{"host": 1}', b"null"]
)
def test_an_invalid_line_names_no_owner(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "lock").write_bytes(line)
    RunLock.acquire(tmp_path, None).release()


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot be opened"):
        RunLock.acquire(tmp_path, None)
    assert not (tmp_path / "precious").exists()


@pytest.mark.usefixtures("no_locks")
def test_without_kernel_locks_a_live_owner_is_still_refused(tmp_path: Path) -> None:
    with holder(tmp_path) as (first, _):
        with pytest.raises(ConfigError, match=f"pid {first.pid}"):
            RunLock.acquire(tmp_path, None)
        first.kill()  # a zombie until it is waited for: dead all the same
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        lock = RunLock.acquire(tmp_path, None)
    assert lock.warning is not None
    assert "has no locks" in lock.warning
    assert str(tmp_path) in lock.warning
    lock.release()


@pytest.mark.usefixtures("no_locks")
def test_without_kernel_locks_a_reused_pid_is_not_the_owner(tmp_path: Path) -> None:
    parent = os.getppid()
    if not _start_ticks(parent):
        pytest.skip("without /proc a number is all there is")
    write_owner(tmp_path, pid=parent, ticks="1")
    RunLock.acquire(tmp_path, None).release()
    write_owner(tmp_path, pid=parent, ticks=_start_ticks(parent), boot="before the power cut")
    RunLock.acquire(tmp_path, None).release()


def test_another_error_of_flock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ConfigError, match="cannot be locked"):
        RunLock.acquire(tmp_path, None)
