"""Text that is not UTF-8, and what else the process finds around it: used, or one sentence.

Bytes that are not UTF-8 on the command line were a traceback, and so were a removed working
directory, a value of TORCH_DISTRIBUTED_DEBUG that torch does not know, and `~` without a home.
Training under such conditions is in tests/drills/test_surroundings.py.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from dmoe.cli import main
from dmoe.cli.surroundings import surroundings_error
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.distributed import local_ranks
from tests.cli.commands import dmoe, environment, refused, run_in_process

ROOT = Path(__file__).parent.parent.parent
LATIN1 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", f"train.run_dir={LATIN1}"),
        ("explain", f"{LATIN1}.yaml"),
        ("explain", f"data.source={LATIN1}"),
        ("report", LATIN1),
        ("generate", "runs/latest", f"--prompt={LATIN1}"),
    ],
    ids=" ".join,
)
def test_arguments_that_are_not_utf8(arguments: tuple[str, ...], tmp_path: Path) -> None:
    refused(run_in_process(*arguments, cwd=tmp_path), "argument=", r"caf\xe9", "is not UTF-8 text")


def test_the_real_command_line(place: Path) -> None:
    """Bytes from a shell, of which Python makes lone surrogates."""
    command = [sys.executable.encode(), b"-m", b"dmoe", b"train", b"train.run_dir=caf\xe9"]
    result = subprocess.run(command, cwd=place, env=environment(), capture_output=True, text=True)
    refused(result, r"argument=train.run_dir=caf\xe9: is not UTF-8 text")
    assert not list(place.glob("caf*"))


def test_a_nul_character(tmp_path: Path) -> None:
    """`train.run_dir` with one was a ValueError of Path.mkdir."""
    config = tmp_path / "config.yaml"
    config.write_text('train:\n  run_dir: "a\\0b"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"NUL .* in line 2 \(train.run_dir\)"):
        load(str(config))
    with pytest.raises(ConfigError, match=r"^train.run_dir=a.*: a NUL character"):
        load(overrides=["train.run_dir=a\0b"])


@pytest.mark.parametrize("text", [r'"\udce9"', r'"\ud800 \U0001f600"'])
def test_lone_surrogates_of_yaml(text: str, tmp_path: Path) -> None:
    """The run started and then could not write resolved.yaml."""
    config = tmp_path / "config.yaml"
    config.write_text(f"data:\n  source: {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text in line 2 \(data.source\)"):
        load(str(config))


def test_overrides_of_python() -> None:
    """`load(overrides=[...])` has not been on a command line."""
    with pytest.raises(ConfigError, match=r"^data.source=caf\\xe9: is not UTF-8 text"):
        load(overrides=[f"data.source={LATIN1}"])


@pytest.mark.parametrize("name", ["config.yaml", "resolved.yaml"])
def test_files_that_are_not_utf8(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"data:\n  source: caf\xe9\n")
    if name == "config.yaml":
        refused(run_in_process("train", name, cwd=tmp_path), "config.yaml", "not UTF-8 text")
    else:
        refused(
            run_in_process("generate", ".", "--prompt", "a", cwd=tmp_path),
            "resolved.yaml",
            "not UTF-8 text",
        )


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    shell = ["bash", "-c", 'mkdir gone && cd gone && rmdir ../gone && exec "$@"', "bash"]
    result = subprocess.run(
        [*shell, sys.executable, "-m", "dmoe", "train"],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    refused(result, "PWD=", "gone: the working directory cannot be used")


@pytest.mark.parametrize("name", ["GLOO_SOCKET_IFNAME", "TORCH_DISTRIBUTED_DEBUG"])
@pytest.mark.parametrize("command", ["train", "verify"])
def test_values_of_the_environment_at_which_torch_ends(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "nosuch")
    refused(run_in_process(command, cwd=tmp_path), f"{name}=nosuch: must")


def test_a_debug_level_at_which_torch_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DETAIL: DDP over gloo was a segmentation fault, and the launcher said nothing of it."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "detail")
    refused(
        run_in_process("verify", cwd=tmp_path),
        "TORCH_DISTRIBUTED_DEBUG=detail: must be OFF or INFO",
    )


def test_a_long_directory_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dmoe verify` was an OSError, AF_UNIX path too long."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("t" * 80)))
    with pytest.raises(ConfigError, match=r"TMPDIR=.*must have at most 70 bytes"):
        local_ranks.run_ranks(1, print)


def errors_of_surroundings() -> dict[str, Exception]:
    """Return real exceptions of Python where it can be brought to raise them."""
    found: dict[str, Exception] = {"ulimit -n": OSError(24, "Too many open files")}
    try:
        Path("a" * 300).is_dir()
    except OSError as error:
        found["path=aaa"] = error
    with mock.patch.object(os.path, "expanduser", lambda path: path):
        try:
            Path("~/run").expanduser()
        except RuntimeError as error:
            found["HOME"] = error
    with (
        mock.patch("tempfile._candidate_tempdir_list", return_value=["/nonexistent"]),
        mock.patch("tempfile.tempdir", None),
    ):
        import tempfile

        try:
            tempfile.gettempdir()
        except FileNotFoundError as error:
            found["TMPDIR"] = error
    return found


@pytest.mark.parametrize("name", ["ulimit -n", "HOME", "TMPDIR", "path=aaa"])
def test_errors_of_the_surroundings_are_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = errors_of_surroundings()[name]
    assert surroundings_error(error), repr(error)

    def broken() -> int:
        raise error

    monkeypatch.setattr(main, "dispatch_command", broken)
    monkeypatch.setattr(main, "prepare_process", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.run()
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert printed.startswith(f"dmoe: {name}")
    assert printed.count("\n") == 1
    assert surroundings_error(OSError(2, "No such file")) is None


def test_the_limit_of_open_files_is_raised(place: Path) -> None:
    """1024 is usual, of 1,048,576 that a process may ask for."""
    program = "import sys; sys.argv = ['dmoe', '--version']\n"
    program += "import atexit, resource\n"
    program += "atexit.register(lambda: print(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))\n"
    program += "from dmoe.cli.main import run; run()"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard)),
    )
    assert int(result.stdout.split()[-1]) == min(hard % (1 << 64), 65536)


def test_inherited_signals_are_reset(place: Path) -> None:
    """A blocked TERM is never delivered; where CHLD is ignored, a child has no exit code."""
    program = "import sys; sys.argv = ['dmoe', '--version']\n"
    program += "import atexit, signal\n"
    program += "atexit.register(lambda: print(signal.pthread_sigmask(signal.SIG_BLOCK, ())))\n"
    program += "atexit.register(lambda: print(signal.getsignal(signal.SIGCHLD)))\n"
    program += "from dmoe.cli.main import run; run()"

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=block,
    )
    assert result.stdout.splitlines()[1:] == [str(signal.SIG_DFL), "set()"]


@pytest.mark.ranks
def test_a_failed_rank_is_no_success_where_children_are_ignored(tmp_path: Path) -> None:
    """`trap '' CHLD; dmoe train --ranks 2` ended with 0 when its ranks had failed."""
    shell = [
        "bash",
        "-c",
        "trap '' CHLD; exec \"$@\"",
        "bash",
        sys.executable,
        "-m",
        "dmoe",
        "train",
    ]
    more = ("--ranks", "2", "train.device=cpu", "train.run_dir=/proc/none")
    command = [*shell, "data.source=synthetic:zipf", *more]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    refused(result, "train.run_dir=/proc/none: cannot be written")


@pytest.mark.parametrize(
    "closed", ["<&-", *(pytest.param(c, marks=pytest.mark.ranks) for c in (">&-", "2>&-"))]
)
def test_closed_descriptors(closed: str, place: Path) -> None:
    shell = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-m", "dmoe", "explain"]
    result = subprocess.run(shell, cwd=place, env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert (result.stdout == "") == (closed == ">&-")


def test_stdout_in_ascii_and_no_locale(place: Path) -> None:
    result = dmoe("explain", cwd=place, LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
