"""Fault 32: configs that try to run code or fill the memory: one line, exit code 2.

Each is given to the real command with a time limit of 20 s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import dmoe, environment, refused
from tests.config.attacks import ATTACKS

pytestmark = pytest.mark.drills


def train_config(place: Path, content: bytes) -> subprocess.CompletedProcess[str]:
    (place / "attack.yaml").write_bytes(content)
    command = [sys.executable, "-m", "dmoe", "train", "attack.yaml"]
    return subprocess.run(
        command,
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_a_file(name: str, tmp_path: Path) -> None:
    content, words = ATTACKS[name]
    result = train_config(tmp_path, content.encode())
    refused(result, "attack.yaml", *words)
    assert len(result.stderr) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["attack.yaml"], (
        "something was run, or written"
    )


@pytest.mark.parametrize(
    "content",
    [b"moe: {top_k: 1} # \xff", "moe: {top_k: 1}".encode("utf-16")],
    ids=["bytes", "UTF-16"],
)
def test_a_file_that_is_no_text(content: bytes, tmp_path: Path) -> None:
    refused(train_config(tmp_path, content), "attack.yaml", "not UTF-8 text")


def test_a_file_without_an_end(tmp_path: Path) -> None:
    refused(dmoe("train", "/dev/zero", cwd=tmp_path), "CONFIG=/dev/zero", "at most 65536 bytes")


def test_a_directory(tmp_path: Path) -> None:
    refused(dmoe("train", str(tmp_path), cwd=tmp_path), "CONFIG=", "cannot be read", "directory")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "moe.top_k=!!python/object/apply:os.system ['touch called']",
            "!!python/object/apply:os.system",
        ),
        ("moe.top_k=" + "[" * 3000, "nested more than 16 deep"),
        ("train.steps=" + "9" * 50000, "a number of 50000 digits"),
        ("data.source=${oc.env:SECRET_OF_THIS_TEST}", "must not hold ${"),
        ("optim.lr=.nan", "finite"),
    ],
    ids=["a call", "nested lists", "50000 digits", "an environment variable", "nan"],
)
def test_an_override(override: str, words: str, tmp_path: Path) -> None:
    result = dmoe("train", override, cwd=tmp_path, SECRET_OF_THIS_TEST="hunter2")
    refused(result, override.partition("=")[0], words)
    assert "hunter2" not in result.stderr
    assert not list(tmp_path.iterdir())
