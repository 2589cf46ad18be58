"""A stdout that is full, closed or ASCII only; and the command without arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import dmoe, environment, refused

FULL = Path("/dev/full")


def run_with_stdout(target: int, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Return exit code and stderr of a command whose stdout is this file descriptor."""
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
    """It was a traceback, or `Exception ignored` with exit code 120 if the text fits the buffer."""
    with FULL.open("wb") as full:
        code, error = run_with_stdout(full.fileno(), *arguments, cwd=place)
    assert (code, error.count("\n")) == (1, 1), error
    assert error.startswith("dmoe: stdout: cannot be written (No space left on device)")


@pytest.mark.parametrize("arguments", [["explain", "--fields"], ["--version"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(arguments: list[str], place: Path) -> None:
    """As in `dmoe explain --fields | head -1`: silent, with the exit code of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    code, error = run_with_stdout(writer, *arguments, cwd=place)
    os.close(writer)
    assert (code, error) == (141, "")


def test_an_error_of_the_command_comes_first(place: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code, error = run_with_stdout(writer, "explain", "moe.top_q=1", cwd=place)
    os.close(writer)
    assert code == 2
    assert "no such field" in error


def test_characters_outside_the_encoding_of_stdout(place: Path) -> None:
    """A sample with one non-ASCII character ended a training with a UnicodeEncodeError."""
    code = "from dmoe.cli import explain, main; "
    code += "explain.fields_as_text = lambda: 'a\\u0142b'; main.run()"
    command = [sys.executable, "-c", code, "explain", "--fields"]
    env = environment() | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "a?b\n", "")


@pytest.mark.parametrize("arguments", [[], ["checkpoint"]], ids=["dmoe", "dmoe checkpoint"])
def test_no_arguments_print_the_help(arguments: list[str], place: Path) -> None:
    """It also said `dmoe: ; see dmoe --help`."""
    result = dmoe(*arguments, cwd=place)
    assert result.returncode == 2
    assert "Usage: dmoe" in result.stdout
    assert result.stderr == ""


INCOMPLETE_LAUNCHERS = {
    "no number": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
    "no rank": ({"WORLD_SIZE": "2"}, "RANK="),
    "a rank outside": ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK=5"),
    "a rank that is no number": ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x"),
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR="),
}


@pytest.mark.parametrize("name", INCOMPLETE_LAUNCHERS)
def test_an_incomplete_launcher_is_refused_before_torch_is_imported(name: str, place: Path) -> None:
    env, words = INCOMPLETE_LAUNCHERS[name]
    refused(dmoe("train", "train.steps=1", cwd=place, **env), words, "start it with torchrun")


def test_a_model_larger_than_the_memory(place: Path) -> None:
    """The kernel killed the process after minutes of swapping."""
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
