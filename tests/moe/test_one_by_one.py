"""The experts one by one on the CPU, against permuting, computing and summing in steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe import MoE
from dmoe.bench.measure import saved_bytes
from dmoe.config.schema import CapacityConfig, ExpertsConfig
from dmoe.moe.experts.grouped_mlp import MLPExperts, feed_forward, feed_forward_in_steps
from dmoe.moe.experts.one_by_one import rows_through_experts
from dmoe.moe.routing import TokenContext

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


def gradients(layer: MoE, x: Tensor, grad: Tensor, context: TokenContext) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x, context)
    torch.autograd.backward(
        [output.y, *output.aux.values()], [grad, *map(torch.ones_like, output.aux.values())]
    )
    weights = [p.grad for p in layer.parameters() if p.grad is not None]
    assert x.grad is not None
    return [output.y.detach(), x.grad, *weights]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("factor", [None, 0.7])
@pytest.mark.parametrize("kind", ["swiglu", "relu"])
def test_tokens_through_experts_equals_the_layer_in_steps(
    kind: str, factor: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drops and padding; no number of rows is round, and one expert gets none."""
    options = {"capacity": CapacityConfig(factor=factor), "experts": ExpertsConfig(kind=kind)}
    layer = MoE(16, 24, 8, 3, **options).to(dtype)
    layer.initialize(0, 0.5, 0.5)
    with torch.no_grad():
        layer.router.bias_E[5] = -10.0
    x, grad = torch.randn(2, 2, 37, 16, dtype=dtype)
    context = TokenContext(valid_T=torch.arange(74).view(2, 37) % 5 != 0)
    gathered = gradients(layer, x, grad, context)
    monkeypatch.setattr(MLPExperts, "takes_tokens", False)
    for one, two in zip(gathered, gradients(layer, x, grad, context), strict=True):
        assert (one - two).norm() <= TOLERANCE[dtype] * two.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_round_blocks_take_no_row_of_the_next_expert(dtype: torch.dtype) -> None:
    """A NaN in one expert's rows stays there; unused rows after the last one give zero."""
    sizes = torch.tensor([3, 0, 21, 9, 4])
    rows, grad = torch.randn(2, 37, 16, dtype=dtype)
    rows[24] = torch.nan
    w_in, w_out = torch.randn(4, 16, 8, dtype=dtype), torch.randn(4, 4, 16, dtype=dtype)
    found = []
    for function in (feed_forward, feed_forward_in_steps):
        leaves = [t.clone().requires_grad_() for t in (rows, w_in, w_out)]
        y = function("swiglu", *leaves, sizes)
        y.backward(grad)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=5e-2, atol=0.5, equal_nan=True)
    y, grad_rows, *grads = found[0]
    assert y[33:].eq(0).all()
    assert grad_rows[33:].eq(0).all()
    for weight in grads:
        assert weight.isnan().flatten(1).any(1).tolist() == [False, False, False, True]
        assert weight[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "relu"])
def test_rows_in_another_order_have_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """As rows that are sorted before and put back after; unused rows are not read, give zero."""
    sizes, rows = [7, 0, 21, 9], 41
    x, grad = torch.randn(2, rows, 16, dtype=dtype)
    order_R = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    x[order_R[37:]] = grad[order_R[37:]] = torch.nan
    w_in, w_out = torch.randn(4, 16, 8, dtype=dtype), torch.randn(4, 8, 16, dtype=dtype)
    if kind == "swiglu":
        w_out = w_out[:, :4].contiguous()
    found = []
    for sorts in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, w_in, w_out)]
        if sorts:
            used_R = order_R[:37]
            y_used = rows_through_experts(kind, leaves[0][used_R], *leaves[1:], sizes)
            y = torch.zeros_like(x).index_copy(0, used_R, y_used)
        else:
            y = rows_through_experts(kind, *leaves, sizes, order_R=order_R)
        y.backward(grad)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)
    assert found[0][0][order_R[37:]].eq(0).all()


def test_float32_weights_are_cast_expert_by_expert() -> None:
    """Under autocast no bf16 copy of the weights is kept, and their gradient is float32."""
    layer, wide = (MoE(16, hidden, 4, 2) for hidden in (64, 256))
    x = torch.randn(1, 24, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        saved = [saved_bytes(lambda layer=layer: layer(x)) for layer in (layer, wide)]
        layer(x).y.float().sum().backward()
    assert layer.experts.w_in.grad.dtype == torch.float32
    rows = 24 * 2 + 4 * 8  # of hidden vectors, at most: each block ends at a multiple of 8
    assert saved[1] - saved[0] <= rows * 2 * (256 - 64) * 2


def test_experts_with_a_forward_of_their_own_get_rows() -> None:
    """A subclass would be given tokens that its `forward` does not know."""

    class Zero(MLPExperts):
        def forward(self, rows_RD: Tensor, tokens_per_expert: Tensor) -> Tensor:
            return rows_RD * 0

    layer = MoE(16, 8, 4, 2)
    layer.experts = Zero("swiglu", 16, 8, 4, 16)
    assert layer(torch.randn(1, 8, 16)).y.eq(0).all()
    assert MLPExperts.takes_tokens
