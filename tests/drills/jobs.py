"""Jobs for the drills: start torchrun and its ranks, add faults, wait, compare bit by bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.checkpoint import latest, verify
from dmoe.runs.metrics_log import read_metrics
from tests.cli.commands import SMALL, environment
from tests.fork_server import LAUNCHER, NEW_RANKS
from tests.forked import ForkedProcess
from tests.json_lines import json_lines

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
"""Twelve steps of a few milliseconds, a checkpoint every 4. Later overrides replace these."""
TIMEOUT_SECONDS = 180.0
"""Maximum duration of a job on a busy machine, in seconds; reached only if it hangs."""


@dataclass
class Job:
    """Running launcher and its run directory."""

    process: subprocess.Popen[str]
    run: Path

    def workers(self) -> list[int]:
        """Return the process ids of the live ranks, rank 0 first."""
        found: dict[int, int] = {}
        for pid in processes_of(self.run):
            rank = _environment_of(pid).get("RANK")
            if rank is not None:
                found[int(rank)] = pid
        return [found[rank] for rank in sorted(found)]

    def steps(self) -> int:
        """Return the last step in `metrics.jsonl`, 0 before the first."""
        lines = (
            read_metrics(self.run / "metrics.jsonl")
            if (self.run / "metrics.jsonl").exists()
            else []
        )
        return max((line["step"] for line in lines), default=0)

    def signal(self, number: int) -> None:
        """Send a signal to the launcher."""
        self.process.send_signal(number)


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a launcher."""

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
    network: str = "",
    rendezvous: Sequence[str] = ("--standalone",),
    log: Path | None = None,
    forked: bool = True,
    **env: str,
) -> Iterator[Job]:
    """Run `torchrun -m tests.drills.driver train ...`; kill all its processes at the end.


    Args:
        run: run directory.
        overrides: of the config.
        ranks: `--nproc-per-node`.
        restarts: `--max-restarts`.
        fault: value of DMOE_FAULT, see driver.py.
        trace: record samples and random numbers in RUN.trace.
        module: module to run in the ranks.
        network: network namespace to run in, of those that fork.
        rendezvous: rendezvous options of torchrun.
        log: file for the output, instead of `finish`.
        forked: the ranks too are forks of a process that has imported them, which saves 4 s of CPU
            time each (tests/forked.py), instead of new interpreters.
        env: additional environment variables.
    """
    tracing = {"DMOE_TRACE": f"{run}.trace"} if trace else {}
    launch = [*rendezvous, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    arguments = [*launch, "--monitor-interval", "0.1", "-m", module, "train", *DRILL]
    arguments += [f"train.run_dir={run}", *overrides]
    run.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext(subprocess.PIPE) if log is None else log.open("a", encoding="utf-8") as output:
        drill = {"PYTHONPATH": str(ROOT), "DMOE_FAULT": fault, "DMOE_DRILL": str(run)}
        env = environment() | drill | tracing | ({} if forked else {NEW_RANKS: "1"}) | env
        process = ForkedProcess(LAUNCHER, arguments, run.parent, env, output, output, network)
    started = Job(process, run)
    try:
        yield started
    finally:
        process.kill()
        for pid in processes_of(run):
            ignore_os_error(os.kill, pid, signal.SIGKILL)
        process.communicate()


def finish(started: Job, timeout: float = TIMEOUT_SECONDS) -> Outcome:
    """Wait for the end of a job."""
    output, errors = started.process.communicate(timeout=timeout)
    return Outcome(started.process.returncode, output, errors)


def start(run: Path, *overrides: str, timeout: float = TIMEOUT_SECONDS, **kwargs: Any) -> Outcome:
    """Run a job to its end."""
    with job(run, *overrides, **kwargs) as started:
        return finish(started, timeout)


def wait_until(
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
    raise AssertionError(f"{what or 'the condition'} was not reached within {timeout:.0f} s")


def losses(run: Path) -> dict[int, str]:
    """Return the logged training losses as hex by step, without those of superseded attempts."""
    return {
        line["step"]: line["loss"].hex()
        for line in read_metrics(run / "metrics.jsonl")
        if line["event"] == "train"
    }


def checkpoint_hashes(run: Path) -> dict[str, Any]:
    """Verify the newest checkpoint; return its step and the SHA-256 of each file."""
    newest = latest(run / "checkpoints")
    assert newest is not None, f"no checkpoint under {run}"
    found = verify(newest)
    return {"step": found.step} | {name: entry.sha256 for name, entry in found.files.items()}


def assert_same_result(run: Path, uninterrupted: Path) -> None:
    """Assert that two runs have the same losses and the same newest checkpoint, bit for bit."""
    assert losses(run) == losses(uninterrupted)
    assert checkpoint_hashes(run) == checkpoint_hashes(uninterrupted)


def trace(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run with `trace=True`, of all attempts, by step and rank."""
    files = sorted(Path(f"{run}.trace").glob("rank-*.jsonl"))
    lines = [line for file in files for line in json_lines(file)]
    return sorted(lines, key=lambda line: (line["step"], line["rank"], line["restart"]))


def processes_of(run: Path) -> list[int]:
    """Return all processes that were started for `run`, also those without a parent."""
    name = str(run)
    return [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if _environment_of(pid).get("DMOE_DRILL") == name
    ]


def state_of(pid: int) -> str:
    """Return the kernel's state of a process: R, S, T (stopped), Z (zombie); empty if none."""
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
    """Return all lines of one kind, also those of superseded attempts."""
    return [line for line in json_lines(run / "metrics.jsonl") if line["event"] == kind]


def ignore_os_error(function: Callable[..., Any], *args: Any) -> None:
    """Call a function and ignore an OSError."""
    with suppress(OSError):
        function(*args)
