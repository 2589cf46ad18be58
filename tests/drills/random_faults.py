"""Drill 34, the soak: random faults for minutes, and at the end the same bits as without one. Not in CI.

    python -m tests.drills.random_faults --minutes 10 --seed 0

Every 5 to 15 seconds one of: `kill` (SIGKILL to a rank), `stop` (SIGSTOP to a rank, which is continued or killed some seconds later),
`term` (SIGTERM to the launcher), `full` (no space on the run's file system for some seconds), `flip` (one bit of the
newest checkpoint's shards is turned over, and a rank killed so that it is read). A supervisor starts the job again when its launcher
has ended.

The run lies on a tmpfs of its own, so it needs the right to mount one. The number of steps follows from a measured step, so that
the job is about done when the time is over; after it no fault strikes, and the job goes on to its last step. Prints one JSON object;
exit code 0 if the result is equal and the job was interrupted at least once.
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

from tests.drills.jobs import Job, events, footprint, job, losses, processes_of, with_suppressed

KINDS = ("kill", "stop", "term", "full", "flip")
RANKS = 2
USEFUL = 0.3
"""Share of the time that is expected to be left for steps which are not lost: a start takes as long as half a pause between faults."""
LIMIT = 4.0
"""Times the minutes after which a job that has not ended is given up."""
TARGETS = 16 * 64
"""Of a step: train.global_batch times data.seq_len."""
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


class Soak:
    """One job under fire. `strike` hurts it, `supervise` keeps it alive; both are called in turn until the job is done."""

    def __init__(self, run: Path, overrides: tuple[str, ...], seed: int) -> None:
        self.run, self.overrides, self.random = run, overrides, random.Random(seed)
        self.struck: Counter[str] = Counter()
        self.launches, self.codes = 0, Counter[int]()
        self._job: Job | None = None
        self._stack = ExitStack()

    def supervise(self) -> bool:
        """Start the job if it is not there; whether it has ended well."""
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

    def strike(self) -> None:
        """One random fault. Where there is nothing to hurt (no rank has started, no second checkpoint), a plainer one or none."""
        kind, rank = self.random.choice(KINDS), self.random.randrange(RANKS)
        pause, ending = (
            self.random.uniform(1, 8),
            self.random.choice((signal.SIGCONT, signal.SIGKILL)),
        )
        place = self.random.random()
        assert self._job is not None
        if kind == "flip" and not self._flip(place):
            kind = "kill"
        self.struck[kind] += 1
        if kind == "term":
            self._job.signal(signal.SIGTERM)
        elif kind == "full":
            self._fill(pause)
        elif kind == "stop":
            stopped = self._hurt(rank, signal.SIGSTOP)
            time.sleep(pause)
            with_suppressed(os.kill, stopped, ending) if stopped else None
        else:
            self._hurt(rank, signal.SIGKILL)

    def close(self) -> None:
        self._stack.close()

    def _hurt(self, rank: int, number: int) -> int | None:
        """Send a signal to a rank; its process id."""
        assert self._job is not None
        workers = self._job.workers()
        if not workers:
            return None
        pid = workers[rank % len(workers)]
        with_suppressed(os.kill, pid, number)
        return pid

    def _flip(self, place: float) -> bool:
        """Turn over one bit of the newest checkpoint; never where it is the only one, which nothing could survive."""
        checkpoints = sorted(
            path for path in (self.run / "checkpoints").glob("step-*") if path.suffix != ".tmp"
        )
        if len(checkpoints) < 2:
            return False
        shards = sorted(checkpoints[-1].glob("*.safetensors"))
        if not shards:
            return False
        shard = shards[int(place * len(shards))]
        with suppress(OSError), shard.open("r+b") as file:
            where = int(place * shard.stat().st_size)
            file.seek(where)
            byte = file.read(1)[0]
            file.seek(where)
            file.write(bytes([byte ^ 1 << int(place * 800) % 8]))
            return True
        return False

    def _fill(self, seconds: float) -> None:
        ballast = self.run.parent / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        time.sleep(seconds)
        ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of this size, gone at the end with all that is on it."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def unbroken(run: Path, *overrides: str) -> float:
    """Run the job without a fault; the median seconds of a step."""
    with job(
        run, *overrides, ranks=RANKS, module="dmoe", log=run.parent / "unbroken.txt"
    ) as started:
        code = started.process.wait()
    assert code == 0, f"the unbroken job ended with {code}: see {run.parent}/unbroken.txt"
    speeds = [line["tokens_per_second"] for line in events(run, "train")]
    return TARGETS / statistics.median(speeds)


def under_fire(soak: Soak, seconds: float) -> bool:
    """Faults for `seconds`, then none until the job ends; whether it ended well in time."""
    began = time.monotonic()
    due = began + soak.random.uniform(5, 15)
    while time.monotonic() < began + LIMIT * seconds:
        if soak.supervise():
            return True
        if due <= time.monotonic() < began + seconds and soak._job is not None:
            soak.strike()
            due = time.monotonic() + soak.random.uniform(5, 15)
        time.sleep(0.1)
    return False


def soak(minutes: float, seed: int, folder: Path) -> dict[str, Any]:
    """The whole drill; what it came to."""
    step = unbroken(folder / "measured", *SHAPE, "train.steps=30", "checkpoint.every=0")
    steps, every = max(20, round(60 * minutes * USEFUL / step)), max(1, round(1.0 / step))
    overrides = (*SHAPE, f"train.steps={steps}", f"checkpoint.every={every}")
    whole = folder / "unbroken"
    unbroken(whole, *overrides)
    began = time.monotonic()
    with small_disk(folder / "disk", 256) as disk:
        drill = Soak(disk / "run", overrides, seed)
        try:
            ended = under_fire(drill, 60 * minutes)
        finally:
            drill.close()
        equal = (
            ended
            and losses(drill.run) == losses(whole)
            and footprint(drill.run) == footprint(whole)
        )
        starts = [line for kind in ("start", "restart") for line in events(drill.run, kind)]
        return {
            "equal": equal,
            "ended": ended,
            "seed": seed,
            "minutes": minutes,
            "seconds": round(time.monotonic() - began),
            "step_seconds": round(step, 3),
            "steps": steps,
            "steps_done_again": len(events(drill.run, "train")) - len(losses(drill.run)),
            "checkpoint_every": every,
            "faults": dict(drill.struck),
            "launches": drill.launches,
            "exit_codes": {str(code): count for code, count in drill.codes.items()},
            "attempts": len(starts),
            "left_processes": len(processes_of(drill.run)),
            "sha256": footprint(drill.run) if ended else {},
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.drills.random_faults",
        description="Random faults, and the same bits at the end.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults strike")
    parser.add_argument("--seed", type=int, default=0, help="which faults, when, and whom they hit")
    parser.add_argument(
        "--folder", type=Path, help="an empty or new directory that keeps logs and the unbroken run"
    )
    given = parser.parse_args()
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    result = soak(
        given.minutes, given.seed, given.folder or Path(tempfile.mkdtemp(prefix="dmoe-soak-"))
    )
    print(json.dumps(result))
    proven = (
        result["equal"] and result["attempts"] > 1
    )  # a job that no fault met in training proves nothing
    sys.exit(0 if proven and not result["left_processes"] else 1)


if __name__ == "__main__":
    main()
