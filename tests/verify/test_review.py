"""Broken programs that an earlier `dmoe verify` called equal: a reviewer found them, and each stays found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dmoe.config.load import load
from dmoe.moe.layer import MoE
from dmoe.train import checkpointer
from dmoe.verify.verify import verify
from tests.verify.test_verify import SHORT, lines


def step_count_lost() -> None:
    """The optimizer's step count was no part of what was compared."""
    share = checkpointer.set_optimizer_step
    checkpointer.set_optimizer_step = lambda optimizer, step: share(optimizer, step * 0 + 1000)  # type: ignore[attr-defined]


def bias_lost() -> None:
    """Nor were the routers' biases after a checkpoint's journey."""
    loaded = checkpointer.load_training_state

    def load_and_forget(engine: Any, path: Any) -> Any:
        extra = loaded(engine, path)
        for layer in engine.model.moe_layers():
            layer.router.get_buffer("bias_E").zero_()
        return extra

    checkpointer.load_training_state = load_and_forget


def groups_for_sequences() -> None:
    """With one sequence a group, a capacity by sequence could not be told from one by rank."""
    batch_shape = MoE.batch_shape

    def confused(self: MoE, sequences: int, tokens: int) -> Any:
        return batch_shape(self, self.virtual_ranks, tokens)

    MoE.batch_shape = confused  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("patch", "settings"),
    [
        (step_count_lost, []),
        (bias_lost, ["moe.balance.bias=0.01"]),
        (groups_for_sequences, ["moe.capacity.factor=1.0", "moe.capacity.group=sequence"]),
    ],
)
def test_it_is_found_now(patch: Callable[[], None], settings: list[str]) -> None:
    report = verify(load(None, [*SHORT, *settings]), worlds=[2], patch=patch)
    assert not report.ok, lines(report)
