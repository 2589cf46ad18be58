"""Checks of the file system of a run directory, with real files, which are removed again."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from dmoe.doctor.findings import Finding, in_gib, judge
from dmoe.runs.lock import LOCKS_UNSUPPORTED

PROBE_BYTES = 1 << 24
SLOW_SYNC = 1.0
"""Seconds to write and sync 16 MiB, above which a synchronous save is felt in each checkpoint."""
IN_MEMORY = ("tmpfs", "ramfs")


def check_storage(folder: Path, checkpoint_bytes: int = 0, keep: int = 1) -> list[Finding]:
    """Write, sync, rename, lock and remove a file where runs will be saved. Not collective.

    Args:
        folder: the run directory, or the directory that it will be made in.
        checkpoint_bytes: bytes of one checkpoint of the config; 0: unknown.
        keep: checkpoints that are kept; one more exists while a new one is written.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    kind = file_system(there)
    try:
        with tempfile.TemporaryDirectory(prefix=".dmoe-doctor-", dir=there) as name:
            seconds = _write_and_rename(Path(name))
            lock = _lock(Path(name) / "lock")
    except OSError as error:
        fix = "choose another train.run_dir, or make it writable and free space"
        return [judge("run directory", f"{there}: {error.strerror or error}", failed=fix)]
    megabytes = PROBE_BYTES / 1e6 / max(seconds, 1e-9)
    slow = "use checkpoint.asynchronous=true, or a faster disk" if seconds > SLOW_SYNC else ""
    volatile = "a restart of the machine deletes it; choose a disk" if kind in IN_MEMORY else ""
    return [
        judge(
            "run directory", f"{there} ({kind}), {megabytes:,.0f} MB/s", warning=slow or volatile
        ),
        _space(there, checkpoint_bytes, keep),
        lock,
    ]


def _write_and_rename(folder: Path) -> float:
    """Return the seconds that a write with fsync and a rename took."""
    start = time.monotonic()
    with (folder / "part").open("wb") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    (folder / "part").rename(folder / "whole")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if (size := (folder / "whole").stat().st_size) != PROBE_BYTES:
        raise OSError(0, f"{size} of {PROBE_BYTES} bytes written")
    return time.monotonic() - start


def _lock(path: Path) -> Finding:
    try:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise
        fix = "two jobs started within milliseconds could share a run; mount it with locks (flock)"
        return judge("locks", "the file system has none", warning=fix)
    return judge("locks", "a run directory can be locked")


def _space(folder: Path, checkpoint_bytes: int, keep: int) -> Finding:
    free = shutil.disk_usage(folder).free
    needed = (keep + 1) * checkpoint_bytes
    text = f"{in_gib(free)} free"
    if needed:
        text += f"; {keep} checkpoints and a new one take {in_gib(needed)}"
    none = "free some space" if free < PROBE_BYTES else ""
    fix = "free space, lower checkpoint.keep, or choose another train.run_dir"
    return judge("disk space", text, failed=none or (fix if needed > free else ""))


def file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`; `unknown` without /proc/mounts."""
    best, kind, target = -1, "unknown", str(path.resolve())
    with suppress(OSError, ValueError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            _, mount, name, *_ = line.split()
            mount = mount.replace("\\040", " ")
            inside = target == mount or target.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= best:
                best, kind = len(mount), name
    return kind
