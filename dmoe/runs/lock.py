"""Lock of a run directory: the file `lock`, held by rank 0 while the job runs.

Two jobs in one directory would mix their metrics and delete each other's checkpoints. The lock is
the kernel's (`flock`). It ends with its process however that dies, so there are no stale locks to
clean up. The file holds one line of JSON that names the owner; after a clean end it is empty. The
line decides where the kernel cannot: on a file system without locks, where the owner's process is
looked up, and for an owner on another host, since network file systems may keep locks per host.

Without kernel locks there is a race: two jobs that start within a few milliseconds can both get in.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from dmoe.config.errors import ConfigError

FIELD = "train.run_dir"
LOCKS_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
MAX_LINE_BYTES = 4096


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock. Its field names are the keys of the file's JSON."""

    host: str
    pid: int
    started: str
    """Local time."""
    job: str | None
    """Elastic launcher's name of the job."""
    boot: str
    """Boot id of the kernel; empty without /proc."""
    ticks: str
    """Start of the process in clock ticks since boot, which tells it from a later process of the
    same pid; empty without /proc."""

    @classmethod
    def current(cls, job: str | None) -> LockOwner:
        pid = os.getpid()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(socket.gethostname(), pid, now, job, _boot_id(), _start_ticks(pid))

    @classmethod
    def parse(cls, line: bytes) -> LockOwner | None:
        """Return the owner that a lock file names; None for a line that is empty or invalid."""
        try:
            owner = cls(**json.loads(line))
        except (ValueError, TypeError):
            return None
        texts = (owner.host, owner.started, owner.boot, owner.ticks)
        valid = (
            all(isinstance(text, str) for text in texts)
            and type(owner.pid) is int
            and isinstance(owner.job, str | None)
        )
        return owner if valid else None

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, started {self.started}"

    def is_on_other_host(self) -> bool:
        """Return whether the process belongs to another kernel.

        Containers on one machine differ in host name, but share boot id and locks.
        """
        return self.host != socket.gethostname() and not (self.boot and self.boot == _boot_id())

    def is_running_here(self) -> bool:
        """Return whether the process still runs here: same boot id, same pid, same start."""
        return (
            self.boot == _boot_id()
            and self.pid != os.getpid()
            and _start_ticks(self.pid) == self.ticks
            and _process_exists(self.pid)
        )


class RunLock:
    """An acquired lock. It ends with `release`, or with the process."""

    def __init__(self, descriptor: int, directory: int, warning: str | None) -> None:
        self._descriptor: int | None = descriptor
        self._directory = directory
        self.warning = warning
        """A limit of this lock that the user should know, or None."""

    @classmethod
    def acquire(cls, run_path: Path, job_id: str | None) -> RunLock:
        """Lock the directory, which must exist.

        Args:
            run_path: the run directory.
            job_id: the launcher's name of this job (TORCHELASTIC_RUN_ID), None without one.

        Raises:
            ConfigError: if another job uses the directory, or may do so on another host, or the
                file cannot be opened.
        """
        path, job = run_path / "lock", None if job_id in (None, "", "none") else job_id
        descriptor = _open(path)
        directory = os.open(run_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            warning = _acquire(descriptor, path, job)
            _acquire_directory(directory, path)
            _write(descriptor, json.dumps(asdict(LockOwner.current(job))).encode() + b"\n")
        except BaseException:
            os.close(descriptor)
            os.close(directory)
            raise
        return cls(descriptor, directory, warning)

    def release(self) -> None:
        """Empty the file, which marks a clean end, and unlock. A second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)
                os.close(self._directory)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _open(path: Path) -> int:
    """Open the file without truncating it, since it may be another job's.

    Closed in child processes, which would keep the lock otherwise.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        problem = f"its lock file cannot be opened ({reason})"
        raise ConfigError(FIELD, path.parent, problem, f"look at {path}") from None


def _acquire(descriptor: int, path: Path, job: str | None) -> str | None:
    """Take the kernel's lock, or without one check whether the owner is alive.

    Returns the lock's warning. Raises ConfigError if another job has the lock.
    """
    warning = None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use_error(path, LockOwner.parse(_read(descriptor))) from None
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            problem = f"cannot be locked ({error.strerror})"
            raise ConfigError(FIELD, path.parent, problem, f"look at {path}") from None
        warning = (
            f"the file system of {path.parent} has no locks: "
            "two jobs on it that start at once would not notice each other"
        )
    owner = LockOwner.parse(_read(descriptor))
    if owner is None:
        return warning
    if owner.is_on_other_host():
        # The same job is no conflict: the elastic launcher has moved rank 0 to this host.
        if job is None or owner.job != job:
            raise _in_use_error(path, owner, "may be", f"if that job is dead, delete {path}")
    elif warning is not None and owner.is_running_here():
        raise _in_use_error(path, owner)
    return warning


def _acquire_directory(directory: int, path: Path) -> None:
    """Lock the directory too, so that deleting the file of a live job does not unlock it."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use_error(path, None) from None
    except OSError as error:
        # Without locks the file's check has decided. NFS gives EBADF: no exclusive lock on what
        # cannot be opened for writing.
        if error.errno not in LOCKS_UNSUPPORTED | {errno.EBADF}:
            problem = f"cannot be locked ({error.strerror})"
            raise ConfigError(FIELD, path.parent, problem, "look at it") from None


def _in_use_error(
    path: Path,
    owner: LockOwner | None,
    verb: str = "is",
    fix: str = "wait for it, stop it, or name another directory",
) -> ConfigError:
    who = str(owner) if owner else f"it has not written its name into {path.name} yet"
    return ConfigError(FIELD, path.parent, f"another job {verb} at work there ({who})", fix)


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, MAX_LINE_BYTES, 0)


def _write(descriptor: int, line: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, line, 0)
    os.fsync(descriptor)


def _boot_id() -> str:
    """Return the id of this boot of the machine, or an empty string without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    """Return the start time of a process: field 22 of /proc/PID/stat.

    Counted from behind the command, which may hold blanks and brackets. Empty if there is no such
    process, or only a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
