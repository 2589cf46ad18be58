"""Whole jobs for the drills: torchrun and its ranks, started as a user starts them, hurt, waited for, and compared bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.checkpoint import latest, verify
from dmoe.runs.metrics_log import read_metrics
from tests.cli.commands import SMALL, environment

__all__ = [
    "DRILL",
    "Job",
    "Outcome",
    "finish",
    "footprint",
    "job",
    "losses",
    "processes_of",
    "same",
    "start",
    "state_of",
    "trace",
    "until",
]

ROOT = Path(__file__).parent.parent.parent
DRILL = (
    *SMALL,
    "data.source=synthetic:zipf",
    "train.steps=12",
    "train.log_every=1",
    "train.eval_every=0",
    "train.sample_tokens=0",
    "checkpoint.every=4",
    "parallel.start_timeout=60",
    "parallel.timeout=20",
)
"""Twelve steps of a few milliseconds, a checkpoint after every fourth. Last override wins, so a drill may change any of it."""
PATIENCE = 180.0
"""Seconds a job may take in all on a busy machine; no drill waits for it unless something hangs."""


@dataclass
class Job:
    process: subprocess.Popen[str]
    run: Path

    def workers(self) -> list[int]:
        """Process ids of the ranks that are alive, rank 0 first."""
        found: dict[int, int] = {}
        for pid in processes_of(self.run):
            rank = _environment_of(pid).get("RANK")
            if rank is not None:
                found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    def steps(self) -> int:
        """The last step in `metrics.jsonl`, 0 before the first."""
        lines = (
            read_metrics(self.run / "metrics.jsonl")
            if (self.run / "metrics.jsonl").exists()
            else []
        )
        return max((line["step"] for line in lines), default=0)

    def signal(self, number: int) -> None:
        """To the launcher."""
        self.process.send_signal(number)


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    errors: str


@contextmanager
def job(
    run: Path,
    *overrides: str,
    ranks: int = 4,
    restarts: int = 0,
    fault: str = "",
    trace: bool = False,
    module: str = "tests.drills.driver",
    prefix: Sequence[str] = (),
    meeting: Sequence[str] = ("--standalone",),
    log: Path | None = None,
    **env: str,
) -> Iterator[Job]:
    """`torchrun --nproc-per-node RANKS --max-restarts RESTARTS -m tests.drills.driver train ...`; nothing of it outlives the block.

    trace: with the driver's record of samples and draws, in RUN.trace. prefix: a command to run it under. meeting: torchrun's
    options for how its nodes find each other. log: a file that takes what it says, in place of `finish`. env: more of the environment.
    """
    launcher = [
        *prefix,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        "--nproc-per-node",
        str(ranks),
    ]
    more = {"DMOE_TRACE": f"{run}.trace"} if trace else {}
    command = [
        *launcher,
        "--max-restarts",
        str(restarts),
        "--monitor-interval",
        "0.1",
        "-m",
        module,
    ]
    run.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext(subprocess.PIPE) if log is None else log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "train", *DRILL, f"train.run_dir={run}", *overrides],
            cwd=run.parent,
            env=environment()
            | {"PYTHONPATH": str(ROOT), "DMOE_FAULT": fault, "DMOE_DRILL": str(run)}
            | more
            | env,
            stdout=output,
            stderr=output,
            text=True,
            errors="replace",
        )
    started = Job(process, run)
    try:
        yield started
    finally:
        process.kill()
        for pid in processes_of(run):
            with_suppressed(os.kill, pid, signal.SIGKILL)
        process.communicate()


def finish(started: Job, timeout: float = PATIENCE) -> Outcome:
    output, errors = started.process.communicate(timeout=timeout)
    return Outcome(started.process.returncode, output, errors)


def start(run: Path, *overrides: str, timeout: float = PATIENCE, **how: Any) -> Outcome:
    """A whole job, from start to end."""
    with job(run, *overrides, **how) as started:
        return finish(started, timeout)


def until(
    condition: Callable[[], bool], started: Job | None = None, timeout: float = 60.0, what: str = ""
) -> None:
    """Wait for `condition`; fail if the job ends before, or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return
        if started is not None and started.process.poll() is not None:
            outcome = finish(started)
            raise AssertionError(
                f"ended with {outcome.code} before {what}: {outcome.errors[-3000:]}"
            )
        time.sleep(0.02)
    raise AssertionError(f"{what or 'the condition'} did not come within {timeout:.0f} s")


def losses(run: Path) -> dict[int, str]:
    """Every logged training loss, to the bit, by step; the numbers of attempts that came to nothing are gone."""
    return {
        line["step"]: line["loss"].hex()
        for line in read_metrics(run / "metrics.jsonl")
        if line["event"] == "train"
    }


def footprint(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run, every byte of its tensors proven: step, and the SHA-256 of each file."""
    newest = latest(run / "checkpoints")
    assert newest is not None, f"no checkpoint under {run}"
    found = verify(newest)
    return {"step": found.step} | {name: entry.sha256 for name, entry in found.files.items()}


def same(run: Path, unbroken: Path) -> None:
    """Assert that a run came to the same end as another, bit for bit: every logged loss, every byte of the last checkpoint."""
    assert losses(run) == losses(unbroken)
    assert footprint(run) == footprint(unbroken)


def trace(run: Path) -> list[dict[str, Any]]:
    """What the ranks of a run with `trace=True` read and drew, in every attempt, by step and rank."""
    files = sorted(Path(f"{run}.trace").glob("rank-*.jsonl"))
    lines = [
        json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return sorted(lines, key=lambda line: (line["step"], line["rank"], line["restart"]))


def processes_of(run: Path) -> list[int]:
    """Every process of this machine that was started for `run`, also one that has lost its parent."""
    mine = str(run)
    return [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if _environment_of(pid).get("DMOE_DRILL") == mine
    ]


def state_of(pid: int) -> str:
    """The kernel's letter for a process: R or S runs or waits, T is stopped, Z has ended; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _environment_of(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if state_of(pid) in ("", "Z"):
            return {}
    except OSError:
        return {}
    return dict(pair.decode(errors="replace").split("=", 1) for pair in pairs if b"=" in pair)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """All lines of one kind, also those of attempts that came to nothing."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def with_suppressed(function: Callable[..., Any], *args: Any) -> None:
    with suppress(OSError):
        function(*args)
