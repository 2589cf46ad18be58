"""Bugs that an earlier `dmoe verify` did not find; a review found them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dmoe.config.load import load
from dmoe.moe.layer import MoE
from dmoe.train import checkpointer
from dmoe.verify.verify import verify
from tests.verify.test_verify import SHORT, lines

pytestmark = pytest.mark.ranks


def wrong_step_count() -> None:
    """Set a wrong optimizer step count: it was not compared."""
    original = checkpointer.set_optimizer_step
    checkpointer.set_optimizer_step = (  # type: ignore[attr-defined]
        lambda optimizer, step: original(optimizer, step * 0 + 1000)
    )


def bias_lost() -> None:
    """Clear the router biases on loading: they were not compared after a checkpoint."""
    original = checkpointer.load_training_state

    def load_and_clear(engine: Any, path: Any) -> Any:
        extra = original(engine, path)
        for layer in engine.model.moe_layers():
            layer.router.get_buffer("bias_E").zero_()
        return extra

    checkpointer.load_training_state = load_and_clear


def groups_for_sequences() -> None:
    """Apply a capacity per sequence as one per rank: equal for one sequence per group."""
    batch_shape = MoE.batch_shape

    def per_rank(self: MoE, sequences: int, tokens: int) -> Any:
        return batch_shape(self, self.virtual_ranks, tokens)

    MoE.batch_shape = per_rank  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("patch", "settings"),
    [
        (wrong_step_count, []),
        (bias_lost, ["moe.balance.bias=0.01"]),
        (groups_for_sequences, ["moe.capacity.factor=1.0", "moe.capacity.group=sequence"]),
    ],
)
def test_bug_is_found(patch: Callable[[], None], settings: list[str]) -> None:
    report = verify(load(None, [*SHORT, *settings]), worlds=[2], patch=patch)
    assert not report.ok, lines(report)
