"""Packed and padded give the same assignments exactly, the same values within rounding."""

from __future__ import annotations

import pytest
import torch

from dmoe import MoE
from dmoe.config.schema import CapacityConfig
from dmoe.moe.routing import TokenContext
from tests.moe.layers import close, gradients, make, tokens_of


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("group", ["rank", "sequence"])
@pytest.mark.parametrize("factor", [0.01, 0.7, 1.3, 50.0])
def test_packed_equals_padded(priority: str, group: str, factor: float) -> None:
    limits = CapacityConfig(factor=factor, group=group, priority=priority)  # type: ignore[arg-type]
    context = TokenContext(valid_T=torch.arange(4 * 7) % 6 != 2)
    x = tokens_of(4, 7)
    one, gradient_one = gradients(
        make(capacity=limits, exchange="packed", virtual_ranks=2), x, context
    )
    two, gradient_two = gradients(
        make(capacity=limits, exchange="padded", virtual_ranks=2), x, context
    )
    for name in ("expert_TK", "keep_TK"):
        assert torch.equal(getattr(one.plan, name), getattr(two.plan, name)), name
    assert one.plan.slots is not None
    assert two.plan.slots is not None
    assert torch.equal(one.plan.slots.position_TK, two.plan.slots.position_TK)
    assert torch.equal(one.stats.as_vector(), two.stats.as_vector())
    close(one.y, two.y, 1e-12)
    close(one.aux, two.aux, 1e-12)
    close(gradient_one, gradient_two, 1e-12)


def test_packed_equals_padded_in_float32() -> None:
    results = []
    for exchange in ("packed", "padded"):
        layer = make(capacity=CapacityConfig(factor=0.9), exchange=exchange).float()
        results.append(gradients(layer, tokens_of(5, 8, dtype=torch.float32)))
    assert torch.equal(results[0][0].plan.keep_TK, results[1][0].plan.keep_TK)  # type: ignore[arg-type]
    close(results[0][0].y, results[1][0].y, 1e-5)
    close(results[0][1], results[1][1], 1e-5)


@pytest.mark.parametrize(("eval_factor", "evaluated"), [(None, torch.Tensor), (1.5, int)])
def test_which_exchange_is_taken(eval_factor: float | None, evaluated: type) -> None:
    """Padded gives one number of rows; without a capacity the forward is packed."""
    layer = make(capacity=CapacityConfig(factor=0.9, eval_factor=eval_factor), exchange="padded")
    seen: list[type] = []
    layer.experts.register_forward_pre_hook(lambda module, inputs: seen.append(type(inputs[1])))
    for training in (True, False):
        layer.train(training)(tokens_of(4, 5))
    assert seen == [int, evaluated]


def test_padded_needs_a_capacity() -> None:
    with pytest.raises(ValueError, match=r"capacity\.factor"):
        MoE(8, 4, 4, 2, exchange="padded")
    with pytest.raises(ValueError, match="packed or padded"):
        MoE(8, 4, 4, 2, exchange="dense")
