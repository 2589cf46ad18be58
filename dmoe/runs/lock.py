"""One job in a run directory: the file `lock`, held by rank 0 for the life of the run.

Two jobs that write one directory mix their metrics and delete each other's checkpoints. The lock is the kernel's (`flock`): it ends
with the process that holds it, however that process dies, so a dead owner's lock needs no cleaning. The file's one line of JSON only
says who holds it; after a clean end it is empty. The line decides in two cases that the kernel cannot: a file system without locks,
where the owner's process is looked up, and an owner on another host, since network file systems may keep locks to one host.

Where there are no locks, the check is not free of races: two jobs that start within the same few milliseconds can both get in.
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
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
LONGEST = 4096  # bytes of the line


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `boot` and `ticks` (the process's start, in clock ticks since boot) tell a process from a later one of the
    same number; both are empty where there is no /proc."""

    host: str
    pid: int
    started: str
    job: str | None
    boot: str
    ticks: str

    @classmethod
    def here(cls, job: str | None) -> Owner:
        pid = os.getpid()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(socket.gethostname(), pid, now, job, _boot(), _ticks(pid))

    @classmethod
    def of(cls, line: bytes) -> Owner | None:
        """The owner a lock file names; None if the line is empty, torn, or not ours."""
        try:
            owner = cls(**json.loads(line))
        except (ValueError, TypeError):
            return None
        texts = (owner.host, owner.started, owner.boot, owner.ticks)
        sound = all(isinstance(text, str) for text in texts) and type(owner.pid) is int and isinstance(owner.job, str | None)
        return owner if sound else None

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, started {self.started}"

    def is_elsewhere(self) -> bool:
        """Whether another kernel knows the process. Containers of one machine differ in host name but share boot and locks."""
        return self.host != socket.gethostname() and not (self.boot and self.boot == _boot())

    def lives_here(self) -> bool:
        """Whether the process still runs under this kernel: the same boot, the same number, the same start."""
        return self.boot == _boot() and self.pid != os.getpid() and _ticks(self.pid) == self.ticks and _exists(self.pid)


class RunLock:
    """The lock of a run directory, once taken. Made by `RunLock.take`, ended by `release` or the end of the process."""

    def __init__(self, descriptor: int, directory: int, remark: str | None) -> None:
        self._descriptor: int | None = descriptor
        self._directory = directory
        self.remark = remark
        """What the user should know about this lock, or None."""

    @classmethod
    def take(cls, run_path: Path, named: str | None) -> RunLock:
        """Lock the directory, which must exist. `named`: what the launcher calls this job (TORCHELASTIC_RUN_ID), None without one.

        Raises:
            ConfigError: another job is at work there; or may be, on another host; or the file cannot be opened.
        """
        path, job = run_path / "lock", None if named in (None, "", "none") else named
        descriptor, directory = _open(path), os.open(run_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remark = _hold(descriptor, path, job)
            _hold_directory(directory, path)
            _write(descriptor, json.dumps(asdict(Owner.here(job))).encode() + b"\n")
        except BaseException:
            os.close(descriptor)
            os.close(directory)
            raise
        return cls(descriptor, directory, remark)

    def release(self) -> None:
        """Empty the file, which says that the run ended by itself, and let go. A second call does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)
                os.close(self._directory)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _open(path: Path) -> int:
    """Never truncated, since it may be another job's; closed in children (Python's default), which would keep the lock alive."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(FIELD, path.parent, f"its lock file cannot be opened ({reason})", f"look at {path}") from None


def _hold(descriptor: int, path: Path, job: str | None) -> str | None:
    """Take the kernel's lock, or without one see whether the owner lives. Returns the remark; raises ConfigError if it is another's."""
    remark = None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(path, Owner.of(_read(descriptor))) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise ConfigError(FIELD, path.parent, f"cannot be locked ({error.strerror})", f"look at {path}") from None
        remark = f"the file system of {path.parent} has no locks: two jobs on it that start at once would not notice each other"
    owner = Owner.of(_read(descriptor))
    if owner is None:
        return remark
    if owner.is_elsewhere():
        if job is None or owner.job != job:  # the same job: the elastic launcher has moved rank 0 to this host
            raise _refusal(path, owner, "may be", f"if that job is dead, delete {path}")
    elif remark is not None and owner.lives_here():
        raise _refusal(path, owner)
    return remark


def _hold_directory(directory: int, path: Path) -> None:
    """The directory itself as well: who deletes the file, of a job that lives, does not get in."""
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(path, None) from None
    except OSError as error:
        # No locks here, which the file has found out already; or (EBADF, on NFS) none on what cannot be opened for writing.
        if error.errno not in NO_LOCKS | {errno.EBADF}:
            raise ConfigError(FIELD, path.parent, f"cannot be locked ({error.strerror})", "look at it") from None


def _refusal(
    path: Path, owner: Owner | None, sure: str = "is", fix: str = "wait for it, stop it, or name another directory"
) -> ConfigError:
    whose = str(owner) if owner else f"it has not written its name into {path.name} yet"
    return ConfigError(FIELD, path.parent, f"another job {sure} at work there ({whose})", fix)


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, LONGEST, 0)


def _write(descriptor: int, line: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, line, 0)
    os.fsync(descriptor)


def _boot() -> str:
    """What tells one boot of this machine from the next; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """Field 22 of /proc/PID/stat, counted from behind the command, which may hold blanks and brackets; empty if there is none,
    or only the exit code of a dead process that nobody has asked for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
