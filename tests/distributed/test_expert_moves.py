"""Experts move between ranks: the training, the checkpoint and its resumption stay the same bits.

Without clipping, whose norm adds the experts of a rank in their order, and with at most two copies,
whose gradients a sum adds in one order, a move changes no bit of what is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.checkpoint import save_load
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.schedule import learning_rate
from dmoe.distributed.init import init_distributed
from dmoe.runs.directory import RunDir
from dmoe.train.checkpointer import Checkpointer, train_state
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import train_step, training_batches
from dmoe.train.step_guard import StepGuard
from dmoe.verify.capture import Capture, _next_places, state_arrays
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

pytestmark = pytest.mark.ranks

PERIODIC = ("parallel.placement.kind=periodic", "parallel.placement.every=1")
GAINED = f"{Path(__file__).parents[1] / 'own_kinds.py'}:Gained"
CASES = (
    ("parallel.ep=4",),
    ("parallel.ep=2", "train.recompute=true", "moe.capacity.factor=1", "moe.exchange=padded"),
    ("parallel.ep=2", "parallel.mode=fsdp", "optim.moments=bf16", f"moe.experts.kind={GAINED}"),
    ("parallel.ep=2", "parallel.mode=fsdp", "moe.num_experts=6", "optim.kind=muon"),
    ("parallel.ep=4", "parallel.mode=fsdp", 'optim.trainable=["*.router.*"]'),
)
"""The third has experts of its own, with one number each, learned and in a buffer: only what had
two dimensions moved, so an expert came home without its gain, and a run with moves trained another
model than one without. The fourth has three experts per rank: FSDP2 shards within them, not by
whole ones."""


EXPERT_BYTES = 4 * (32 * 2 * 24 + 24 * 32)
"""Of the float32 weights of one expert."""


def ep_of(case: tuple[str, ...]) -> int:
    return int(case[0].partition("=")[2])


def build(*overrides: str) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = load_plugins(tiny("optim.clip=null", "moe.balance.bias=0.01", *overrides))
    return build_engine(config, init_distributed("cpu"), VOCAB)


def train(engine: Engine, data: Any, first: int, last: int) -> list[float]:
    """Train steps `first` to `last` - 1 with the moves after them; return the losses."""
    losses, config = [], engine.config
    for step in range(first, last):
        rate = learning_rate(step, config.train.steps, config.optim)
        totals = train_step(engine, training_batches(data.train, engine, step), rate).totals
        losses.append(totals.loss_sum)
        if engine.placement is not None:
            engine.placement.after_step(step + 1, totals.kept_LE, last=False)
    return losses


def fixed_and_moved(rank: int, world: int, folder: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [one_case(f"{folder}/{n}", case) for n, case in enumerate(CASES)]


def one_case(folder: str, case: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, more in (("fixed", ()), ("moved", PERIODIC)):
        engine = build(*case, *more)
        if engine.placement is not None:
            engine.placement.plan = _next_places
        losses = train(engine, engine.task.open_data(), 0, 3)
        ids = [layer.placement.physical_ids.values for layer in engine.model.moe_layers()]
        with engine.contiguous_experts():
            state, path = train_state(engine), Path(f"{folder}-{name}")
            save_load.save(path, 3, state, {}, group=engine.mesh.control_group)
        found[name] = {"losses": losses, "state": state_arrays(engine), "ids": ids}
        if engine.placement is not None:
            found[name]["moves"] = engine.placement.take_metrics()
        engine.close()
    return found


def test_training_and_checkpoint_are_those_of_fixed_placement(tmp_path: Path) -> None:
    for found in run_ranks(4, fixed_and_moved, tmp_path, timeout=240):
        for case, result in zip(CASES, found, strict=True):
            fixed, moved = result["fixed"], result["moved"]
            assert moved["losses"] == fixed["losses"], case
            assert_equal(moved["state"], fixed["state"])
            assert all(a != b for a, b in zip(moved["ids"], fixed["ids"], strict=True)), case
            # after each of three steps, in two layers, one expert of each rank
            moves = 3 * 2 * ep_of(case)
            assert moved["moves"]["moves"] == moves
            if "parallel.mode=fsdp" not in case:  # weights and two moments of every copy
                copies = 4 // ep_of(case)
                assert moved["moves"]["moved_bytes"] == moves * copies * 3 * EXPERT_BYTES
    for n, case in enumerate(CASES):
        files = [
            save_load.read_manifest(tmp_path / f"{n}-{name}" / "step-00000003").files
            for name in ("fixed", "moved")
        ]
        fixed, moved = ({name: entry.sha256 for name, entry in part.items()} for part in files)
        assert moved == fixed, case


def saved_and_resumed(rank: int, world: int, folder: Path) -> list[Any]:
    """Save in the middle of a run and train on; resume it in another engine, also at fixed places.

    Returns, for each: physical ids and state at the save, losses after it.
    """
    torch.set_num_threads(1)
    found: list[Any] = []
    follow = ("parallel.placement.kind=periodic", "parallel.placement.every=2")
    for settings in (follow, follow, (*follow, "parallel.placement.from=last"), ()):
        if world == 1 and settings != follow:
            continue
        engine = build(*settings, f"parallel.virtual_ranks={2 // world}")
        data, guard = engine.task.open_data(), StepGuard(engine.config.guard)
        checkpoints = Checkpointer(engine, data, RunDir(folder), guard)
        if checkpoints.resume() == 0:
            train(engine, data, 0, 4)
            checkpoints.save(4)
        ids = [layer.placement.physical_ids.values for layer in engine.model.moe_layers()]
        found.append((ids, state_arrays(engine), train(engine, data, 4, 8)))
        engine.close()
    return found


def test_a_resumed_run_continues_with_the_same_bits_wherever_its_experts_are(
    tmp_path: Path,
) -> None:
    """At the same EP size with the placement of the save, at another or fixed in equal runs."""
    runs = tuple(range(8))
    for found in run_ranks(2, saved_and_resumed, tmp_path, timeout=120):
        (ids, state, losses), *resumed = found
        assert ids != [runs, runs], "nothing moved"
        assert [places for places, _, _ in resumed] == [ids, ids, [runs, runs]]
        for _, loaded, later in resumed:
            assert_equal(loaded, state)
            assert later == losses
    for (places, loaded, later), *_ in run_ranks(1, saved_and_resumed, tmp_path, timeout=120):
        assert places == [runs, runs]
        assert_equal(loaded, state)
        assert later == pytest.approx(losses, rel=1e-5)


def assert_equal(found: Capture, expected: Capture) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
