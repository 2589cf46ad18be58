"""Fault 30: secrets of the environment, command line and config are in no file and no output."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.commands import SMALL, dmoe

pytestmark = pytest.mark.drills

TOKEN = "correct-horse-battery-staple"
KEY = "ab12cd34" * 5
LONG = "xY7-" * 20
"""Longer than a value in a message: the shown part is a secret too."""
SECRETS = {"MY_SERVICE_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "DB_PASSWORD": LONG}
BY_FORMAT = "hf_" + "aB3d" * 9
"""In no environment variable: recognized by its format."""
TRACKED = ("tracking.trackers=[wandb,tensorboard]", "tracking.wandb_mode=offline")


def assert_absent(place: Path, result: subprocess.CompletedProcess[str], *given: Path) -> None:
    """Assert that no 12 characters of a secret are in the output or a file that dmoe wrote."""
    for secret in (*SECRETS.values(), BY_FORMAT):
        for piece in (secret[start : start + 12] for start in range(0, len(secret) - 11, 4)):
            assert piece not in result.stdout
            assert piece not in result.stderr
            for path in place.rglob("*"):
                if path.is_file() and path not in given:
                    assert piece.encode() not in path.read_bytes(), path


def train(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return dmoe("train", *arguments, *SMALL, "train.run_dir=run", cwd=place, **SECRETS)


def test_in_the_environment_and_in_comments(tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(
        f"# mine: {TOKEN}\n# wandb login {KEY}\n# api_key: hunter2-and-more\n"
        f"tracking:\n  project: mine  # {BY_FORMAT}, {LONG}\n",
        encoding="utf-8",
    )
    result = train(tmp_path, "given.yaml", *TRACKED)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_absent(tmp_path, result, given)
    kept = (tmp_path / "run/config.yaml").read_text(encoding="utf-8")
    assert "project: mine" in kept
    assert "[redacted]" in kept
    assert "hunter2" not in kept
    assert list((tmp_path / "run/logs/wandb").glob("offline-run-*/*.wandb")), "wandb wrote no file"


MISTAKES = {
    "part of a path": ("data.source", f"data.source=/data/{TOKEN}/x.txt"),
    "part of a name": ("tracking.project", f"tracking.project=p-{LONG}"),
    "known by its format": ("tracking.project", f"tracking.project={BY_FORMAT}"),
    "a wandb key": ("train.sample_prompt", f"train.sample_prompt={KEY}"),
    "a list": ("checkpoint.accept_changes", f"checkpoint.accept_changes=[{TOKEN}]"),
    "a field that there is not": ("tracking.api_key", f"tracking.api_key={KEY}"),
    "a field that there is not, a value of its own": (
        "tracking.api_key",
        "tracking.api_key=hunter2",
    ),
    "a number's place": ("moe.top_k", f"moe.top_k={LONG}"),
    "no override": ("argument", TOKEN),
    "no override, with a sign": ("override", f"{TOKEN}=1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_by_mistake_on_the_command_line(name: str, tmp_path: Path) -> None:
    field, argument = MISTAKES[name]
    result = dmoe("train", *SMALL, *TRACKED, "train.run_dir=run", argument, cwd=tmp_path, **SECRETS)
    assert result.returncode == 2, result.stderr[-3000:]
    assert len(result.stderr.splitlines()) == 1
    assert field in result.stderr
    assert "[redacted]" in result.stderr
    assert "hunter2" not in result.stderr
    assert_absent(tmp_path, result)
    assert not (tmp_path / "run").exists(), "nothing is written before the refusal"


@pytest.mark.parametrize(
    "text",
    [
        f"data:\n  source: {TOKEN}\n",
        f"tracking:\n  password: {LONG}\n",
        f"{KEY}: 1\n",
        f"- {LONG}\n",
    ],
)
def test_by_mistake_in_the_config_file(text: str, tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text(text, encoding="utf-8")
    result = train(tmp_path, "given.yaml")
    assert result.returncode == 2, result.stderr[-3000:]
    assert_absent(tmp_path, result, given)
    assert not (tmp_path / "run").exists()
