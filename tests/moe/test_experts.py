"""Grouped product and activations, against loops and against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import grouped_mm

from dmoe.config.expert_shapes import GATED
from dmoe.moe.experts import FeedForward, MLPExperts
from dmoe.moe.experts.activation import ACTIVATION_FNS, swiglu
from dmoe.moe.experts.grouped_mlp import feed_forward, feed_forward_in_steps
from dmoe.moe.experts.grouped_product import grouped_linear
from tests.references.experts import grouped_linear_reference, swiglu_reference

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 9], [4, 4, 4, 4], [0, 0, 0, 0]]
FORMULAS = {
    "swiglu": lambda h: h.chunk(2, -1)[0] * torch.sigmoid(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "geglu": lambda h: (
        h.chunk(2, -1)[0] * 0.5 * (1 + torch.erf(h.chunk(2, -1)[0] / 2**0.5)) * h.chunk(2, -1)[1]
    ),
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "relu": lambda h: h.clamp(min=0),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def close(got: Tensor | None, expected: Tensor | None, tolerance: float = 1e-12) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear_equals_one_row_at_a_time(counts: list[int]) -> None:
    results = []
    for product in (grouped_linear, grouped_linear_reference):
        rows, weight = draw(sum(counts), 6), draw(4, 6, 5, seed=1)
        out = product(rows, weight, torch.tensor(counts))
        (
            out.sin().sum() + 0 * weight.sum()
        ).backward()  # the loop has no path to the weights when there is no row
        results.append((out, rows.grad if sum(counts) else None, weight.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_grouped_linear_gradcheck() -> None:
    count_e = torch.tensor([2, 0, 3])
    assert gradcheck(
        lambda rows, weight: grouped_linear(rows, weight, count_e),
        (draw(5, 4), draw(3, 4, 2, seed=1)),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_grouped_linear_equals_grouped_mm(dtype: torch.dtype, tolerance: float) -> None:
    count_e = torch.tensor([7, 0, 20, 5])
    ends_e = count_e.cumsum(0).to(torch.int32)
    results = []
    for fast in (True, False):
        rows, weight = draw(32, 16, dtype=dtype), draw(4, 16, 8, seed=1, dtype=dtype)
        out = (
            grouped_linear(rows, weight, count_e) if fast else grouped_mm(rows, weight, offs=ends_e)
        )
        out.float().sin().sum().backward()
        results.append((out, rows.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        close(got, expected, tolerance)


@pytest.mark.parametrize("each", [0, 1, 5])
def test_equal_groups_equal_counts(each: int) -> None:
    """The padded exchange hands over one number instead of a tensor; nothing else may differ."""
    results = []
    for per_expert in (each, torch.full((3,), each)):
        rows, weight = draw(3 * each, 4), draw(3, 4, 2, seed=1)
        out = grouped_linear(rows, weight, per_expert)
        out.sin().sum().backward()
        results.append((out, rows.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize("kind", sorted(FORMULAS))
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("out_dim", [4, 7])
def test_experts_equal_one_row_at_a_time(kind: str, counts: list[int], out_dim: int) -> None:
    experts = MLPExperts(kind, 4, 3, 4, out_dim).double()
    experts.initialize(seed=1, layer=0, std=0.7, out_std=0.9)
    expert_R = torch.arange(4).repeat_interleave(torch.tensor(counts)).tolist()
    results = []
    for fast in (True, False):
        experts.zero_grad()
        rows = draw(sum(counts), 4)
        if fast:
            out = experts(rows, torch.tensor(counts))
        else:
            each = [
                FORMULAS[kind](row @ experts.w_in[e]) @ experts.w_out[e]
                for row, e in zip(rows, expert_R, strict=True)
            ]
            out = torch.stack(each) if each else rows.new_zeros(0, out_dim) + 0 * rows.sum()
        (out.sin().sum() + 0 * (experts.w_in.sum() + experts.w_out.sum())).backward()
        results.append((out, rows.grad, experts.w_in.grad, experts.w_out.grad))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-11)


@pytest.mark.parametrize("kind", sorted(FORMULAS))
@pytest.mark.parametrize("per_expert", [torch.tensor([3, 0, 5, 4]), 3, 0])
def test_fused_equals_step_by_step(kind: str, per_expert: Tensor | int) -> None:
    """What the CPU runs, and what CUDA runs."""
    results = []
    for function in (feed_forward, feed_forward_in_steps):
        rows = draw(4 * per_expert if isinstance(per_expert, int) else 12, 5)
        w_in, w_out = draw(4, 5, 6, seed=1), draw(4, 3 if kind in GATED else 6, 2, seed=2)
        out = function(kind, rows, w_in, w_out, per_expert)
        out.sin().sum().backward()
        results.append((out, rows.grad, w_in.grad, w_out.grad))
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_expert_without_rows_has_a_zero_gradient(counts: list[int], dtype: torch.dtype) -> None:
    """Zero, not None: every rank must enter the sum over an expert's copies on other ranks."""
    experts = MLPExperts("swiglu", 8, 16, 4, 8).to(dtype)
    experts.initialize(0, 0, 0.3, 0.3)
    experts(draw(sum(counts), 8, dtype=dtype), torch.tensor(counts)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert [bool(grad.any()) for grad in parameter.grad] == [count > 0 for count in counts]


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_experts_gradcheck(kind: str) -> None:
    experts = MLPExperts(kind, 3, 2, 3, 3).double()
    experts.initialize(0, 0, 0.8, 0.8)
    count_e = torch.tensor([2, 0, 3])

    def run(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return torch.func.functional_call(experts, {"w_in": w_in, "w_out": w_out}, (rows, count_e))

    assert gradcheck(run, (draw(5, 3), experts.w_in, experts.w_out))


@pytest.mark.parametrize("frozen", ["rows", "w_in", "w_out", "both"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str) -> None:
    results = []
    for freeze in (True, False):
        experts = MLPExperts("swiglu", 4, 3, 3, 4).double()
        experts.initialize(0, 0, 0.5, 0.5)
        rows = draw(6, 4)
        if freeze:
            rows.requires_grad_(frozen != "rows")
            experts.w_in.requires_grad_(frozen not in ("w_in", "both"))
            experts.w_out.requires_grad_(frozen not in ("w_out", "both"))
        experts(rows, torch.tensor([1, 3, 2])).sin().sum().backward()
        results.append({"rows": rows.grad, "w_in": experts.w_in.grad, "w_out": experts.w_out.grad})
    names = ("w_in", "w_out") if frozen == "both" else (frozen,)
    for name, got in results[0].items():
        if name in names:
            assert got is None
        else:
            close(got, results[1][name])


def test_float32_weights_serve_bf16_rows() -> None:
    """Autocast: the master weights stay float32 and so do their gradients."""
    experts = MLPExperts("swiglu", 16, 8, 3, 16)
    experts.initialize(0, 0, 0.3, 0.3)
    count_e = torch.tensor([4, 0, 8])
    out = experts(draw(12, 16, dtype=torch.bfloat16), count_e)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert experts.w_in.grad is not None
    assert experts.w_in.grad.dtype == torch.float32
    exact = experts.double()(draw(12, 16), count_e)
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)


def test_swiglu_equals_its_formula() -> None:
    results = []
    for function in (swiglu, swiglu_reference):
        hidden = draw(7, 10)
        out = function(hidden)
        out.sin().sum().backward()
        results.append((out, hidden.grad))
    for got, expected in zip(*results, strict=True):
        close(got, expected)
    assert gradcheck(swiglu, (draw(4, 6),))


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_activations_equal_their_formulas(kind: str) -> None:
    hidden = draw(5, 6)
    close(ACTIVATION_FNS[kind](hidden), FORMULAS[kind](hidden))
    assert (kind in GATED) == (ACTIVATION_FNS[kind](hidden).shape[1] == 3)


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_zero_rows_stay_zero(kind: str) -> None:
    """What lets an empty slot of the padded exchange be computed and thrown away."""
    assert not FORMULAS[kind](torch.zeros(2, 6)).any()
    assert not ACTIVATION_FNS[kind](torch.zeros(2, 6)).any()


def test_dense_feed_forward() -> None:
    dense = FeedForward("swiglu", 4, 6, 5).double()
    dense.initialize(0, "block.0", 0.5, 0.5)
    x = draw(2, 3, 4)
    expected = FORMULAS["swiglu"](x @ dense.w_in.weight.t()) @ dense.w_out.weight.t()
    close(dense(x), expected)
