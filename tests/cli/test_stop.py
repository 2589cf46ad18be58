"""A stop signal saves the current step on all ranks, for a later resume."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.commands import SMALL, dmoe, environment, metrics, refused
from tests.forked import ForkedProcess

pytestmark = pytest.mark.ranks

ENDLESS = [
    *SMALL,
    "train.steps=100000",
    "train.log_every=1",
    "train.eval_every=0",
    "checkpoint.every=0",
    "train.run_dir=run",
]


def wait_for_steps(run: Path, process: subprocess.Popen[str], count: int = 3) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and sum(
            event["event"] == "train" for event in metrics(run)
        ) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps, exit code {process.poll()}")


@pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]], ids=["alone", "two ranks"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(tmp_path: Path, ranks: list[str], number: signal.Signals) -> None:
    process = ForkedProcess("dmoe", ["train", *ENDLESS, *ranks], tmp_path, environment())
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    last = metrics(tmp_path / "run")[-1]
    assert last["event"] == "end"
    assert f"stopped after step {last['step']}" in output
    assert (
        tmp_path / "run" / "checkpoints" / f"step-{last['step']:08d}" / "manifest.json"
    ).exists()
    if number == signal.SIGINT:
        return
    # what is printed is the whole line to paste: it used to be one override of several
    command = output.partition("continue with: dmoe ")[2].splitlines()[0].split()
    assert command == ["train", "--resume", "run", *ranks]
    more = f"train.steps={last['step'] + 1}"
    result = dmoe(*command, more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "run")[-1]["step"] == last["step"] + 1
    refused(dmoe(*command, "train.run_dir=x", cwd=tmp_path), "does not go with --resume")
    refused(dmoe("train", "--resume", "no", cwd=tmp_path), "RUN=no: is not a run directory")
