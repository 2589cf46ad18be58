"""The grouped GEMM of CUDA: any width, any number of rows, and a gradient for every expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe import MoE
from dmoe.config.schema import CapacityConfig, ExpertsConfig
from dmoe.moe.experts import grouped_product
from dmoe.moe.experts.grouped_mlp import feed_forward_in_steps
from dmoe.moe.experts.grouped_product import grouped_linear
from dmoe.moe.routing import TokenContext

WIDTHS = [
    {"dim": 30},
    {"dim": 13},
    {"expert_dim": 20},
    {"expert_dim": 100},
    {"expert_dim": 100, "experts": ExpertsConfig(kind="gelu")},
    {"out_dim": 10},
    {"out_dim": 2},
    {"out_dim": 3, "capacity": CapacityConfig(factor=1.25)},
    {"num_experts": 4, "experts": ExpertsConfig(shapes=[[64], [12], [20, 36], []])},
    {"num_experts": 2, "out_dim": 10, "experts": ExpertsConfig(shapes=[[50], [50]])},
]


def layer_of(**options: Any) -> MoE:
    sizes = {"dim": 64, "expert_dim": 64, "num_experts": 8} | options
    return MoE(sizes.pop("dim"), sizes.pop("expert_dim"), sizes.pop("num_experts"), 2, **sizes)


@pytest.mark.usefixtures("cuda_branch")
@pytest.mark.parametrize("options", WIDTHS, ids=str)
def test_any_width_has_a_forward_and_a_backward(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`grouped_mm` takes only rows that start at multiples of 16 bytes: 8 numbers in bf16.

    Every dropless layer with another width died on a GPU, and with it the classifiers of
    configs/seeds, whose last layer is as wide as there are classes. Adapters were padded, on the
    belief that experts are always wide.
    """
    monkeypatch.setattr(torch.Tensor, "tolist", lambda counts: [16] * len(counts))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda count: 16)
    with torch.device("meta"):
        layer = layer_of(**options).bfloat16()
        x = torch.empty(2, 64, options.get("dim", 64), dtype=torch.bfloat16, requires_grad=True)
        output = layer(x, TokenContext(noise_key=(0, 0)))
    (output.y.float().sum() + sum(output.aux.values())).backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "out"), [(6, 5), (1, 8), (8, 3), (13, 10), (16, 8)])
@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 6, 0]])
def test_the_branch_of_cuda_computes_the_product_of_the_cpu(
    counts: list[int], width: int, out: int, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Float64 too, which `grouped_mm` refuses: `dmoe verify` computes in it."""
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    start = torch.randn(6, width, dtype=dtype), torch.randn(4, width, out, dtype=dtype)
    results = []
    for branch in ("cpu", "cuda"):
        if branch == "cuda":
            request.getfixturevalue("cuda_branch")
        rows, weight = (part.clone().requires_grad_() for part in start)
        result = grouped_linear(rows, weight, torch.tensor(counts))
        result.sin().sum().backward()
        results.append((result, rows.grad, weight.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.usefixtures("cuda_branch")
def test_more_groups_than_the_kernel_takes_are_computed_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch checks `group_count < 1024`; a bank of 1,024 modules on one GPU is allowed here."""
    monkeypatch.setattr(grouped_product, "grouped_mm", None)
    counts = torch.ones(1024, dtype=torch.int64)
    assert grouped_linear(torch.ones(1024, 8), torch.ones(1024, 8, 8), counts).shape == (1024, 8)


@pytest.mark.usefixtures("cuda_branch")
@pytest.mark.parametrize("kind", ["swiglu", "relu"])
def test_no_rows_at_all_have_a_backward(kind: str) -> None:
    """The gradient of a sum is expanded, with strides (0, 0).

    `contiguous()` keeps them where there are no elements, and `grouped_mm` refuses them. A rank
    that receives no token has such rows.
    """
    with torch.device("meta"):
        rows = torch.empty(0, 64, dtype=torch.bfloat16, requires_grad=True)
        hidden = 128 if kind == "swiglu" else 64
        w_in = torch.empty(4, 64, hidden, dtype=torch.bfloat16, requires_grad=True)
        w_out = torch.empty(4, 64, 32, dtype=torch.bfloat16, requires_grad=True)
        counts = torch.zeros(4, dtype=torch.int64)
    feed_forward_in_steps(kind, rows, w_in, w_out, counts).sum().backward()
    assert w_in.grad is not None
    assert w_out.grad is not None


@pytest.mark.usefixtures("cuda_branch")
@pytest.mark.parametrize(("capability", "zero"), [((9, 0), False), ((10, 0), True)])
def test_an_expert_without_rows_has_a_zero_gradient_on_blackwell(
    capability: tuple[int, int], zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel stores an accumulator that it never set (pytorch/pytorch#172439).

    What was in memory became the gradient of an unused expert: at worst NaN, at best another
    number in each run. Hopper needs no second pass over the gradient, so it has none.
    """
    real = grouped_product.grouped_mm

    def unset_without_rows(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
        out = real(left, right, offs=offs)
        if right.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(grouped_product, "grouped_mm", unset_without_rows)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    weight = torch.randn(4, 8, 8, requires_grad=True)
    grouped_linear(torch.randn(6, 8), weight, torch.tensor([0, 4, 0, 2])).sin().sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad[[0, 2]] == 0).all()) == zero
    assert bool((weight.grad[[1, 3]] != 0).all())
