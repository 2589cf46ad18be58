"""Run the real command in a new process, or in this one (`run_in_process`), which is faster."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from dmoe.cli.main import dispatch_command
from tests.forked import ForkedProcess
from tests.json_lines import json_lines

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
TIMEOUT_SECONDS = 120.0
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    """Return the environment without a launcher's variables, with one thread per process."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_SILENT": "true",
        "COLUMNS": "100",
    }


def dmoe(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `dmoe ARGUMENTS` in a new process.

    A fork of one that has imported it, which saves 3 s of CPU time (tests/forked.py). With `env`, a
    new interpreter; so are the ranks that it starts.
    """
    if env:
        return _run([sys.executable, "-m", "dmoe", *arguments], cwd, env)
    with ForkedProcess("dmoe", arguments, cwd, environment()) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def run_in_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `dmoe ARGUMENTS` in this process; an error that is no user's mistake is raised."""
    out, err = io.StringIO(), io.StringIO()
    arguments_patch = mock.patch.object(sys, "argv", ["dmoe", *arguments])
    environment_patch = mock.patch.dict(os.environ, environment(), clear=True)
    with (
        arguments_patch,
        environment_patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = dispatch_command()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def launched(*arguments: str, cwd: Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --standalone --nproc-per-node N -m dmoe ...`."""
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
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def refused(result: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    """Assert one line on stderr with all of `words`, nothing on stdout, and this exit code."""
    assert result.returncode == code, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("dmoe: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
    assert result.stdout == ""


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return json_lines(run / "metrics.jsonl")


def train_lines(run: Path) -> dict[int, dict[str, Any]]:
    """Return the last `train` line of each step."""
    return {line["step"]: line for line in metrics(run) if line["event"] == "train"}
