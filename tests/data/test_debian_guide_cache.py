"""The guide is fetched once: with a stand-in for apt-get, since tests have no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmoe.cli.main import dispatch_command
from dmoe.data import debian_guide
from dmoe.data.debian_guide import PACKAGE, GuideUnavailableError, guide_root
from tests.data.conftest import write_guide

pytestmark = pytest.mark.ranks

NOT_INSTALLED = (
    "from pathlib import Path; from dmoe.data import debian_guide; "
    "debian_guide.INSTALLED = Path('absent')"
)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins for apt-get and dpkg-deb first on the PATH.

    They copy a guide from `archive`; the file `calls` records their arguments.
    """
    monkeypatch.setattr(debian_guide, "INSTALLED", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    write_guide(tmp_path / "archive" / "usr" / "share" / "doc" / PACKAGE, pages=2)
    (tmp_path / "bin").mkdir()
    command(
        tmp_path,
        "apt-get",
        f'echo "$@" >> {tmp_path}/calls; sleep 0.2; echo package > {PACKAGE}_1_all.deb',
    )
    command(
        tmp_path, "dpkg-deb", f'test "$1" = -x && test -s "$2" && cp -r {tmp_path}/archive "$3"'
    )
    return tmp_path


def command(root: Path, name: str, script: str) -> None:
    path = root / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def left(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache" / "dmoe").iterdir())


def test_it_is_fetched_once(archive: Path) -> None:
    for _ in range(2):
        root = guide_root()
        assert root == archive / "cache" / "dmoe" / PACKAGE
        assert sorted(path.name for path in root.iterdir()) == ["de", "el", "en"]
    assert (archive / "calls").read_text() == f"download {PACKAGE}\n"
    assert left(archive) == [PACKAGE, f"{PACKAGE}.lock"]


def test_what_is_installed_is_taken(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_guide, "INSTALLED", write_guide(archive / "installed", pages=1))
    assert guide_root() == archive / "installed"
    assert not (archive / "calls").exists()


def test_processes_that_start_at_once_fetch_once(archive: Path) -> None:
    """Under torchrun every rank opens the data."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"{NOT_INSTALLED}; print(debian_guide.guide_root())"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said == {str(archive / "cache" / "dmoe" / PACKAGE)}
    assert (archive / "calls").read_text() == f"download {PACKAGE}\n"
    assert left(archive) == [PACKAGE, f"{PACKAGE}.lock"]


def test_without_locks_the_first_rename_counts(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(debian_guide.fcntl, "flock", refuse)
    rename = os.rename

    def second(source: Path, target: Path) -> None:
        """Another process has renamed its copy a moment before."""
        write_guide(Path(target), pages=2)
        rename(source, target)

    monkeypatch.setattr(debian_guide.os, "rename", second)
    assert (guide_root() / "en" / "index.html").is_file()
    assert left(archive) == [PACKAGE, f"{PACKAGE}.lock"]


def test_half_a_guide_in_the_cache_is_replaced(archive: Path) -> None:
    half = archive / "cache" / "dmoe" / PACKAGE / "en"
    half.mkdir(parents=True)
    (half / "ch01.html").write_text("half")
    root = guide_root()
    assert (root / "en" / "index.html").is_file()
    assert "half" not in (root / "en" / "ch01.html").read_text()


@pytest.mark.parametrize(
    ("apt", "dpkg", "message"),
    [
        (
            "echo W: warned >&2; echo E: Unable to locate package >&2; exit 100",
            None,
            r"`apt-get download .*` failed \(E: Unable to lo",
        ),
        ("exit 7", None, r"`apt-get download .*` failed \(exit code 7\)"),
        ("true", None, "apt-get left 0 packages"),
        (
            None,
            "echo dpkg-deb: error: not a Debian archive >&2; exit 2",
            r"`dpkg-deb -x .*` failed .*not a Debian archive",
        ),
        (None, "mkdir -p $3", "the package holds no page"),
        ("exec sleep 30", None, "took more than 1 s"),
    ],
)
def test_what_fails_is_said_and_leaves_nothing(
    archive: Path, monkeypatch: pytest.MonkeyPatch, apt: str | None, dpkg: str | None, message: str
) -> None:
    monkeypatch.setattr(debian_guide, "_DOWNLOAD_SECONDS", 1)
    for name, script in (("apt-get", apt), ("dpkg-deb", dpkg)):
        if script is not None:
            command(archive, name, script)
    with pytest.raises(GuideUnavailableError, match=message):
        guide_root()
    assert left(archive) == [f"{PACKAGE}.lock"]


def test_without_apt_it_says_so(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(archive))
    with pytest.raises(GuideUnavailableError, match="there is no apt-get here"):
        guide_root()


def test_a_cache_that_cannot_be_written_is_said(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (archive / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(archive / "file"))
    with pytest.raises(
        GuideUnavailableError, match=r"the cache .*file/dmoe cannot be written \(Not a directory\)"
    ):
        guide_root()


def test_a_relative_cache_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "somewhere"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert debian_guide.cache_directory() == Path.home() / ".cache" / "dmoe"


def test_training_ends_with_one_sentence_and_code_2(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(archive, "apt-get", "echo E: no network >&2; exit 100")
    monkeypatch.setattr(
        sys, "argv", ["dmoe", "train", "data.source=guide:de", f"train.run_dir={archive}/run"]
    )
    assert dispatch_command() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.source=guide:de: needs Debian's package installation-guide-amd64, and" in line
    assert "installation-guide-amd64, and `apt-get download" in line
    assert "(E: no network)" in line
    assert "or name text files instead" in line
    assert not (archive / "run").exists()
