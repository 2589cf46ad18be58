"""Where the installation guide lies: installed, in the cache, or fetched into the cache once.

Fetching needs no root: `apt-get download` takes the package from the archives this machine is set up with, `dpkg-deb -x` unpacks it.
The pages are renamed into the cache when they are whole, so a process that is killed on the way leaves nothing that looks like them.
Under torchrun every rank opens the data: the first takes the cache's lock and fetches, the others wait for it. Where a file system has
no locks, several fetch, and the first rename counts.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["INSTALLED", "PACKAGE", "Unavailable", "cache_directory", "guide_root"]

PACKAGE = "installation-guide-amd64"
INSTALLED = Path("/usr/share/doc") / PACKAGE
_DOWNLOAD_SECONDS = 180
_UNPACK_SECONDS = 60


class Unavailable(Exception):
    """The guide is nowhere and cannot be fetched; the text says why."""


def guide_root() -> Path:
    """The directory with one directory of pages for each language; 18 MB are fetched if there is none.

    Raises Unavailable where that is not possible.
    """
    cached = cache_directory() / PACKAGE
    for root in (INSTALLED, cached):
        if _is_guide(root):
            return root
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cached.parent / f"{PACKAGE}.lock"):
            if not _is_guide(cached):  # another process has fetched it while this one waited
                _fetch(cached)
    except OSError as error:
        raise Unavailable(f"the cache {cached.parent} cannot be written ({error.strerror})") from error
    return cached


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/dmoe, or ~/.cache/dmoe."""
    # The XDG specification: a relative path is invalid and is to be ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "dmoe"


def _is_guide(root: Path) -> bool:
    return (root / "en" / "index.html").is_file()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the kernel's lock on a file; it ends with the process that holds it, however that process dies."""
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks: see the module's docstring
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{PACKAGE}-") as folder:
        _run(["apt-get", "download", PACKAGE], folder, _DOWNLOAD_SECONDS)
        packages = list(Path(folder).glob("*.deb"))
        if len(packages) != 1:
            raise Unavailable(f"apt-get left {len(packages)} packages")
        _run(["dpkg-deb", "-x", packages[0].name, "unpacked"], folder, _UNPACK_SECONDS)
        pages = Path(folder, "unpacked", "usr", "share", "doc", PACKAGE)
        if not _is_guide(pages):
            raise Unavailable(f"the package holds no page {pages.name}/en/index.html")
        if target.exists():  # what a person has left of it: not whole, or _fetch would not have been called
            shutil.rmtree(target)
        try:
            os.rename(pages, target)
        except OSError:
            if not _is_guide(target):  # else another process, on a file system without locks, was first
                raise


def _run(command: list[str], folder: str, seconds: int) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, timeout=seconds, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Unavailable(f"there is no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(command)}` took more than {seconds} s") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"`{' '.join(command)}` failed ({said[-1]})")
