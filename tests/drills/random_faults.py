"""Drill 34: random faults for minutes, and the same bits at the end as without. Not in CI.

    python -m tests.drills.random_faults --minutes 10 --seed 0

Every 5 to 15 seconds one of: `kill` (SIGKILL to a rank), `stop` (SIGSTOP to a rank, which is
continued or killed some seconds later), `term` (SIGTERM to the launcher), `full` (no space on the
run's file system for some seconds), `flip` (one bit of the newest checkpoint's shards is flipped,
and a rank killed so that it is read). The job is started again whenever its launcher has ended.

The run is on a tmpfs, so the drill needs the right to mount one. The number of steps follows from a
measured step, so that the job is almost done at the end of the given time; after it there are no
faults, and the job runs to its last step. Prints one JSON object; exit code 0 if the result is
equal and the job was interrupted at least once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.drills.jobs import (
    Job,
    checkpoint_hashes,
    events,
    ignore_os_error,
    job,
    losses,
    processes_of,
)

KINDS = ("kill", "stop", "term", "full", "flip")
RANKS = 2
USEFUL = 0.3
"""Expected share of the time for steps that are not lost to starts and repetitions."""
LIMIT = 4.0
"""Multiple of the given minutes after which the drill is stopped."""
TARGETS = 16 * 64
"""Targets per step: train.global_batch times data.seq_len."""
SHAPE = (
    *(
        "model.dim=128",
        "model.layers=4",
        "model.heads=4",
        "moe.expert_dim=256",
        "data.seq_len=64",
        "train.global_batch=16",
    ),
    *("parallel.timeout=5", "checkpoint.asynchronous=true", "checkpoint.on_error=continue"),
)


class RandomFaults:
    """Job with random faults: call `supervise` and `inject` in turn until the job is done."""

    def __init__(self, run: Path, overrides: tuple[str, ...], seed: int) -> None:
        self.run, self.overrides, self.random = run, overrides, random.Random(seed)
        self.injected: Counter[str] = Counter()
        self.launches, self.codes = 0, Counter[int]()
        self._job: Job | None = None
        self._stack = ExitStack()

    def supervise(self) -> bool:
        """Start the job if it is not running; return True if it has ended with code 0."""
        if self._job is None:
            log = self.run.parent.parent / "log.txt"
            self._job = self._stack.enter_context(
                job(
                    self.run,
                    *self.overrides,
                    ranks=RANKS,
                    restarts=3,
                    module="dmoe",
                    log=log,
                    TORCH_ELASTIC_SHUTDOWN_TIMEOUT="10",
                )
            )
            self.launches += 1
        code = self._job.process.poll()
        if code is None:
            return False
        self.codes[code] += 1
        self._stack.close()
        self._job = None
        return code == 0

    def inject(self) -> None:
        """Inject one random fault; a simpler one or none before ranks or two checkpoints exist."""
        kind, rank = self.random.choice(KINDS), self.random.randrange(RANKS)
        pause, ending = (
            self.random.uniform(1, 8),
            self.random.choice((signal.SIGCONT, signal.SIGKILL)),
        )
        position = self.random.random()
        assert self._job is not None
        if kind == "flip" and not self._flip(position):
            kind = "kill"
        self.injected[kind] += 1
        if kind == "term":
            self._job.signal(signal.SIGTERM)
        elif kind == "full":
            self._fill(pause)
        elif kind == "stop":
            stopped = self._signal_rank(rank, signal.SIGSTOP)
            time.sleep(pause)
            ignore_os_error(os.kill, stopped, ending) if stopped else None
        else:
            self._signal_rank(rank, signal.SIGKILL)

    def close(self) -> None:
        """End the job."""
        self._stack.close()

    def _signal_rank(self, rank: int, number: int) -> int | None:
        """Send a signal to a rank and return its process id, None before there are ranks."""
        assert self._job is not None
        workers = self._job.workers()
        if not workers:
            return None
        pid = workers[rank % len(workers)]
        ignore_os_error(os.kill, pid, number)
        return pid

    def _flip(self, position: float) -> bool:
        """Flip one bit of the newest checkpoint, unless it is the only one; return True if done."""
        checkpoints = sorted(
            path for path in (self.run / "checkpoints").glob("step-*") if path.suffix != ".tmp"
        )
        if len(checkpoints) < 2:
            return False
        shards = sorted(checkpoints[-1].glob("*.safetensors"))
        if not shards:
            return False
        shard = shards[int(position * len(shards))]
        with suppress(OSError), shard.open("r+b") as file:
            offset = int(position * shard.stat().st_size)
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << int(position * 800) % 8]))
            return True
        return False

    def _fill(self, seconds: float) -> None:
        """Fill the file system of the run for some seconds."""
        filler = self.run.parent / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(seconds)
        filler.unlink(missing_ok=True)


@contextmanager
def tmpfs(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size; unmount it at the end."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run_without_faults(run: Path, *overrides: str) -> float:
    """Run the job without a fault; return the median seconds per step."""
    with job(
        run, *overrides, ranks=RANKS, module="dmoe", log=run.parent / "uninterrupted.txt"
    ) as started:
        code = started.process.wait()
    assert code == 0, f"the uninterrupted job ended with {code}: see {run.parent}/uninterrupted.txt"
    speeds = [line["tokens_per_second"] for line in events(run, "train")]
    return TARGETS / statistics.median(speeds)


def inject_until_done(drill: RandomFaults, seconds: float) -> bool:
    """Inject faults for `seconds`, then wait; return True if the job ended with code 0 in time."""
    start = time.monotonic()
    due = start + drill.random.uniform(5, 15)
    while time.monotonic() < start + LIMIT * seconds:
        if drill.supervise():
            return True
        if due <= time.monotonic() < start + seconds and drill._job is not None:
            drill.inject()
            due = time.monotonic() + drill.random.uniform(5, 15)
        time.sleep(0.1)
    return False


def run_drill(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """Run the drill and return its result."""
    step = run_without_faults(folder / "measured", *SHAPE, "train.steps=30", "checkpoint.every=0")
    steps, every = max(20, round(60 * minutes * USEFUL / step)), max(1, round(1.0 / step))
    overrides = (*SHAPE, f"train.steps={steps}", f"checkpoint.every={every}")
    reference = folder / "uninterrupted"
    run_without_faults(reference, *overrides)
    start = time.monotonic()
    with tmpfs(folder / "disk", 256) as disk:
        drill = RandomFaults(disk / "run", overrides, seed)
        try:
            ended = inject_until_done(drill, 60 * minutes)
        finally:
            drill.close()
        equal = (
            ended
            and losses(drill.run) == losses(reference)
            and checkpoint_hashes(drill.run) == checkpoint_hashes(reference)
        )
        starts = [line for kind in ("start", "restart") for line in events(drill.run, kind)]
        return {
            "equal": equal,
            "ended": ended,
            "seed": seed,
            "minutes": minutes,
            "seconds": round(time.monotonic() - start),
            "step_seconds": round(step, 3),
            "steps": steps,
            "steps_done_again": len(events(drill.run, "train")) - len(losses(drill.run)),
            "checkpoint_every": every,
            "faults": dict(drill.injected),
            "launches": drill.launches,
            "exit_codes": {str(code): count for code, count in drill.codes.items()},
            "attempts": len(starts),
            "left_processes": len(processes_of(drill.run)),
            "sha256": checkpoint_hashes(drill.run) if ended else {},
        }


def main() -> None:
    """Parse the arguments, run the drill, print its result."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.drills.random_faults",
        description="Random faults, and the same bits at the end.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="duration of the faults")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the faults, their times and ranks"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="an empty or new directory that keeps logs and the uninterrupted run",
    )
    given = parser.parse_args()
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    result = run_drill(
        given.minutes, given.seed, given.folder or Path(tempfile.mkdtemp(prefix="dmoe-drill-"))
    )
    print(json.dumps(result))
    # an uninterrupted job proves nothing
    passed = result["equal"] and result["attempts"] > 1
    sys.exit(0 if passed and not result["left_processes"] else 1)


if __name__ == "__main__":
    main()
