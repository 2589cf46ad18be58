"""Bugs that an earlier `dmoe verify` did not find; a review found them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dmoe.config.load import load
from dmoe.models.attention import Attention as SelfAttention
from dmoe.modular.aggregation import Attention
from dmoe.moe.layer import MoE
from dmoe.train import checkpointer, evaluation
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


def scores_unscaled() -> None:
    """Attend to modules without the division by the root: a module's output had no row."""
    original = Attention.forward

    def unscaled(self: Attention, *args: Any) -> Any:
        width, self.key_dim = self.key_dim, 1
        output = original(self, *args)
        self.key_dim = width
        return output

    Attention.forward = unscaled  # type: ignore[method-assign]


def key_norm_unused() -> None:
    """Normalize the keys by the queries' norm: the checkpoint's error hid the gradient's row."""
    original = SelfAttention.forward

    def one_norm(self: SelfAttention, *args: Any) -> Any:
        own = self._modules["k_norm"]
        self._modules["k_norm"] = self._modules["q_norm"]
        output = original(self, *args)
        self._modules["k_norm"] = own
        return output

    SelfAttention.forward = one_norm  # type: ignore[method-assign]


def padding_evaluated() -> None:
    """Count the padding of the last evaluation batch as targets: no evaluation was compared."""
    evaluation.masked = lambda value, valid: value  # type: ignore[attr-defined]


def section_not_passed_on() -> None:
    """Build layers with the default of a section: both sides read what the constructor had made."""
    build = MoE.from_config.__func__  # type: ignore[attr-defined]

    def with_default(cls: type[MoE], config: Any, *args: Any, **kwargs: Any) -> MoE:
        layer: MoE = build(cls, config, *args, **kwargs)
        layer.capacity = replace(layer.capacity, priority="position")
        return layer

    MoE.from_config = classmethod(with_default)  # type: ignore[assignment, method-assign]


LORA = [
    "modular.bank=low_rank",
    "modular.modules=4",
    "modular.routing=top_k",
    "modular.top_k=2",
    "modular.aggregation=attention",
]
BY_SCORE = ["moe.capacity.factor=1.0", "moe.capacity.priority=score"]


@pytest.mark.parametrize(
    ("patch", "settings", "quantity"),
    [
        (wrong_step_count, [], "checkpoint written here, read by 1"),
        (bias_lost, ["moe.balance.bias=0.01"], "checkpoint written here, read by 1"),
        (
            groups_for_sequences,
            ["moe.capacity.factor=1.0", "moe.capacity.group=sequence"],
            "dropped set",
        ),
        (scores_unscaled, LORA, "module outputs"),
        (key_norm_unused, ["model.qk_norm=true"], "dense gradients"),
        (padding_evaluated, [], "evaluation"),
        (section_not_passed_on, BY_SCORE, "dropped set"),
    ],
)
def test_bug_is_found(patch: Callable[[], None], settings: list[str], quantity: str) -> None:
    # one process is enough for what has nothing to do with ranks, and starts twice as fast
    worlds = [2] if "checkpoint" in quantity else [1]
    report = verify(load(None, [*SHORT, *settings]), worlds=worlds, patch=patch)
    assert report.first is not None
    assert report.first.quantity == quantity, lines(report)
