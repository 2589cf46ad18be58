"""The real command in a process of its own, as a user would type it; `answered` runs it in this one, where a start proves nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from dmoe.cli.main import dispatch_command

__all__ = ["SMALL", "answered", "dmoe", "launched", "metrics", "refused", "train_lines"]

SMALL = (
    "model.dim=32",
    "model.layers=2",
    "model.heads=2",
    "moe.expert_dim=24",
    "moe.capacity.factor=1.25",
    "data.seq_len=16",
    "train.steps=6",
    "train.global_batch=8",
    "train.eval_sequences=8",
    "train.precision=fp32",
    "train.device=cpu",
    "train.log_every=1",
    "train.eval_every=3",
    "train.sample_tokens=20",
    "optim.warmup=2",
    "checkpoint.every=3",
)
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    """One thread a process: on two cores that others use too, more threads wait for each other."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_SILENT": "true",
        "COLUMNS": "100",
    }


def dmoe(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return _run([sys.executable, "-m", "dmoe", *arguments], cwd, env)


def answered(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What `dmoe` would give back, from this process. A defect of ours is raised here, with its traceback."""
    out, err = io.StringIO(), io.StringIO()
    asked = mock.patch.object(sys, "argv", ["dmoe", *arguments])
    surroundings = mock.patch.dict(os.environ, environment(), clear=True)
    with (
        asked,
        surroundings,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = dispatch_command()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def launched(*arguments: str, cwd: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc-per-node N -m dmoe ...`."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "dmoe",
    ]
    return _run([*launcher, *arguments], cwd, {})


def _run(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment() | env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )


def refused(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    """One line on stderr with all of `words`, nothing on stdout, this exit code."""
    assert result.returncode == code, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("dmoe: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    assert result.stdout == ""


def metrics(run: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def train_lines(run: Path) -> dict[int, dict[str, Any]]:
    """The last `train` line of each step."""
    return {line["step"]: line for line in metrics(run) if line["event"] == "train"}
