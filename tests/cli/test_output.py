"""stdout that is full, closed early, or of few letters; and the command without arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import dmoe, environment, refused

FULL = Path("/dev/full")


def written_to(target: int, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit code and stderr of a command whose stdout is a file descriptor."""
    command = [sys.executable, "-m", "dmoe", *arguments]
    result = subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        stdout=target,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stderr


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "arguments", [["explain", "--fields"], ["--version"], ["--help"]], ids=" ".join
)
def test_a_full_disk_is_one_sentence(arguments: list[str], place: Path) -> None:
    """It was a traceback, or the interpreter's own `Exception ignored` with exit code 120, for a text that fits the buffer."""
    with FULL.open("wb") as full:
        code, error = written_to(full.fileno(), *arguments, cwd=place)
    assert (code, error.count("\n")) == (1, 1), error
    assert error.startswith("dmoe: stdout: cannot be written (No space left on device)")


@pytest.mark.parametrize("arguments", [["explain", "--fields"], ["--version"]], ids=" ".join)
def test_a_reader_that_has_left_is_no_error(arguments: list[str], place: Path) -> None:
    """As in `dmoe explain --fields | head -1`: quiet, and the exit code of a process that SIGPIPE ended."""
    reader, writer = os.pipe()
    os.close(reader)
    code, error = written_to(writer, *arguments, cwd=place)
    os.close(writer)
    assert (code, error) == (141, "")


def test_an_error_of_the_command_itself_wins(place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, error = written_to(writer, "explain", "moe.top_q=1", cwd=place)
    os.close(writer)
    assert code == 2
    assert "no such field" in error


def test_letters_that_stdout_does_not_know(place: Path) -> None:
    """A UnicodeEncodeError, at the end of a training whose sample held one letter that is not ASCII."""
    code = "from dmoe.cli import explain, main; explain.fields_as_text = lambda: 'a\\u0142b'; main.run()"
    command = [sys.executable, "-c", code, "explain", "--fields"]
    env = environment() | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "a?b\n", "")


@pytest.mark.parametrize("arguments", [[], ["checkpoint"]], ids=["dmoe", "dmoe checkpoint"])
def test_nothing_asked_is_answered_with_the_help(arguments: list[str], place: Path) -> None:
    """It also said `dmoe: ; see dmoe --help`."""
    result = dmoe(*arguments, cwd=place)
    assert result.returncode == 2
    assert "Usage: dmoe" in result.stdout
    assert result.stderr == ""


HALF = {
    "no number": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
    "no rank": ({"WORLD_SIZE": "2"}, "RANK="),
    "a rank outside": ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5"),
    "a rank that is no number": ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR="),
}


@pytest.mark.parametrize("name", HALF)
def test_half_a_launcher_is_refused_before_torch_starts(name: str, place: Path) -> None:
    env, words = HALF[name]
    refused(dmoe("train", "train.steps=1", cwd=place, **env), words, "start it with torchrun")


def test_a_model_that_this_machine_cannot_hold(place: Path) -> None:
    """The kernel ended the process, after minutes of swapping. What follows `gives` depends on the machine."""
    huge = [
        "model.dim=1048576",
        "model.layers=8",
        "train.device=cpu",
        f"train.run_dir={place / 'never'}",
    ]
    refused(
        dmoe("train", *huge, cwd=place),
        "model.dim=1048576",
        "parameters, whose training takes at least",
        "on this machine",
    )
    assert not (place / "never").exists()


def test_the_file_descriptor_of_stdout_is_kept_for_json(place: Path) -> None:
    assert json.loads(dmoe("explain", "--fields", "--json", cwd=place).stdout)
