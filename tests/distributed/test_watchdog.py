"""The watchdog ends a rank whose main thread waits for a lost one, and no rank that is only slow.

On NCCL the main thread waits for a stream of the GPU. Here it sleeps or computes: nothing that
could raise an error.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dmoe.checkpoint.async_saver import AsyncSaver
from dmoe.distributed import watchdog
from dmoe.distributed.rank_failure import LivenessProbe, LivenessResponder
from dmoe.distributed.watchdog import Watchdog
from dmoe.train import run, trainer
from tests.ranks import RankError, run_ranks
from tests.tiny import tiny

TIMEOUT = 1.5


def wait_in_step_2(rank: int, world: int, fault: str, folder: Path) -> None:
    """Watch two steps; rank 1 stops or is late in the second, where rank 0 waits for it."""
    watchdog.GRACE = watchdog.STORE_OWNER_GRACE = 1.5
    watchdog._print = lambda text: (folder / f"{rank}.txt").open("a").write(f"{text}\n")
    responder = LivenessResponder()
    dog = Watchdog(TIMEOUT, [lambda: (folder / "before exit").touch()])
    dog.start()
    dist.barrier()  # a rank that starts late would be late in step 1
    with dog.watch("step 1"):
        dist.barrier()
    with dog.watch("step 2"):
        if rank == 1 and fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(2.5 * TIMEOUT if fault == "late" else 600)
    dog.close()
    responder.close()


@pytest.mark.ranks
def test_a_lost_rank_is_named_while_the_main_thread_cannot_be_woken(tmp_path: Path) -> None:
    """On NCCL the roll call never came: torch killed the process after the time-out (exit 134).

    Nobody said which rank was gone, and the checkpoint that was being written was lost.
    """
    with pytest.raises(RankError, match="rank 0 died with exit code 1"):
        run_ranks(2, wait_in_step_2, "stopped", tmp_path)
    (said,) = (tmp_path / "0.txt").read_text().splitlines()
    assert said.startswith("rank 0 lost rank 1 in step 2 after ")
    assert "(the rank is dead, frozen or cut off): no end after 0.8 of parallel.timeout" in said
    assert (tmp_path / "before exit").exists()


@pytest.mark.ranks
def test_a_step_that_is_only_long_ends_nothing(tmp_path: Path) -> None:
    """Rank 0 says once that all ranks answer; each multiple of the time probes them again."""
    run_ranks(2, wait_in_step_2, "late", tmp_path)
    (said,) = (tmp_path / "0.txt").read_text().splitlines()
    assert said.startswith("step 2 has taken ")
    assert not (tmp_path / "1.txt").exists()
    assert not (tmp_path / "before exit").exists()


def test_steps_and_evaluations_are_watched_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the start and the first step, which have minutes, nor a save, where a disk may be slow."""
    watched: list[str] = []
    seen: list[tuple[str, str]] = []

    def noting(name: str, real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            seen.append((name, watched[-1] if watched else ""))
            return real(*args, **more)

        return call

    @contextmanager
    def watch(self: Watchdog, name: str) -> Iterator[None]:
        watched.append(name)
        yield
        watched.pop()

    monkeypatch.setattr(Watchdog, "watch", watch)
    for owner, name in (
        *((Watchdog, "start"), (run, "build_engine"), (trainer, "evaluate"), (trainer, "update")),
        *((AsyncSaver, "save"), (AsyncSaver, "wait"), (Watchdog, "close")),
    ):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    config = tiny(
        *(f"train.run_dir={tmp_path}", "train.steps=2", "train.eval_first=true"),
        *("train.eval_every=1", "checkpoint.every=1", "checkpoint.asynchronous=true"),
    )
    run.train(config, "", quiet=True)
    evaluation = ("evaluate", "the evaluation after step")
    assert [(name, inside.rstrip(" 012")) for name, inside in seen if name != "wait"] == [
        ("build_engine", ""),
        evaluation,
        ("update", "step"),
        ("start", ""),
        ("save", ""),
        evaluation,
        ("update", "step"),
        ("save", ""),
        evaluation,
        ("close", ""),
    ]
    assert ("wait", "") in seen
    assert not [inside for name, inside in seen if name == "wait" and inside]


def test_a_probe_that_ends_after_the_step_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank may be late enough for a probe, and miss it, and still arrive."""
    dog = Watchdog(1.0, [lambda: pytest.fail("the process would end")])
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, text: ended.append(text))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(watchdog, "describe_probe", lambda probe, name, waited: name)
    monkeypatch.setattr(watchdog, "owns_store", lambda: False)
    monkeypatch.setattr(watchdog, "probe_ranks", lambda *args: LivenessProbe([1]))
    with dog.watch("step 7"):
        dog._check(1, "1.1")
        dog._check(0, "0.1")
    dog._check(1, "1.2")
    with dog.watch("step 8"):
        dog._check(1, "1.3")
    assert ended == ["step 7"]
