"""Triton's kernels against the torch forms; `test_triton_kernels.py` runs this in a new process.

Triton decides at its import whether a function is for its interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.config.schema import CapacityConfig
from dmoe.moe.dispatch import Permutation, permute, unpermute
from dmoe.moe.experts import grouped_mlp
from dmoe.moe.experts.activation import ACTIVATIONS, activate, activate_backward
from dmoe.moe.kernels import OPERATORS
from dmoe.moe.layer import MoE
from tests.moe.strategies import limit_to, random_routing
from tests.moe.test_dispatch import placement_of

DTYPES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Tolerance: float32 sums in another order; the torch form rounds to bf16 more often."""
TOKENS, TOP_K, EXPERTS = 23, 3, 5
WIDTH = 1037  # more than one block of columns, not a power of two


def permutation(how: str) -> tuple[Permutation, Tensor]:
    """Rows and weights of a routing: all kept, some dropped, or padded slots of which some are
    empty; in the last two a token has lost all of its choices."""
    routing = random_routing(TOKENS, EXPERTS, TOP_K, seed=4)
    factor = None if how == "all" else 0.4
    plan = limit_to(routing, CapacityConfig(), factor, 1)
    assert how == "all" or not plan.is_kept_TK.any(1).all()
    return placement_of(plan, "padded" if how == "padded" else "packed"), plan.weight_TK


def poisoned(value_TK: Tensor, permutation: Permutation) -> Tensor:
    """Weights of dropped choices are NaN: nothing may read them."""
    keep_TK = permutation.keep_TK
    return value_TK if keep_TK is None else value_TK.masked_fill(~keep_TK, torch.nan)


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = DTYPES.get(expected.dtype, 0.0)
    scale = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("how", ["all", "dropped", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_move_as_with_torch(dtype: torch.dtype, how: str) -> None:
    ops, (there, weight_TK) = torch.ops.dmoe, permutation(how)
    x_TD = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    rows_RD = permute(x_TD, there)
    assert torch.equal(ops.gather_rows(x_TD, there.token_R, there.filled_R), rows_RD)
    grad_RD = torch.randn_like(rows_RD)
    rows_RD.backward(grad_RD)
    assert x_TD.grad is not None
    close(ops.sum_rows(grad_RD, there.row_TK, None, there.keep_TK), x_TD.grad)

    rows_RD = torch.randn_like(rows_RD).requires_grad_()
    weight_TK = weight_TK.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    y_TD = unpermute(rows_RD, weight_TK, there)
    grad_TD = torch.randn_like(y_TD)
    y_TD.backward(grad_TD)
    weight = poisoned(weight_TK.detach(), there)
    close(ops.sum_rows(rows_RD, there.row_TK, weight, there.keep_TK), y_TD)
    more = (there.assignment_R, there.filled_R)
    got_RD, got_TK = ops.sum_rows_backward(grad_TD, rows_RD, weight_TK, *more)
    close(got_RD, rows_RD.grad)
    # the torch form multiplies in the rows' dtype, so it is as exact as that
    close(got_TK.to(dtype), weight_TK.grad.to(dtype))


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_equal_torch(dtype: torch.dtype, kind: str) -> None:
    hidden_RH = torch.randn(7, 2 * WIDTH, dtype=dtype)
    hidden_RH[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    expected_RF = activate(kind, hidden_RH)
    got_RF = torch.ops.dmoe.activate(kind, hidden_RH)
    close(got_RF[1:], expected_RF[1:])
    assert torch.equal(got_RF[0].isfinite(), expected_RF[0].isfinite())
    hidden_RH = hidden_RH[1:]
    grad_RF = torch.randn_like(expected_RF[1:])
    activated_RF, grad_RH, _ = activate_backward(kind, hidden_RH, grad_RF.clone())
    got_RF, got_RH = torch.ops.dmoe.activate_backward(kind, hidden_RH, grad_RF)
    close(got_RF, activated_RF)
    close(got_RH, grad_RH)


def test_nothing_to_do_launches_nothing() -> None:
    ops, none = torch.ops.dmoe, torch.empty(0, dtype=torch.int64)
    assert ops.gather_rows(torch.randn(4, 8), none, None).shape == (0, 8)
    row_TK, weight_TK = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    rows_0D = torch.empty(0, 8)
    assert torch.equal(ops.sum_rows(rows_0D, row_TK, weight_TK, weight_TK > 1), torch.zeros(4, 8))
    _, grad_TK = ops.sum_rows_backward(torch.randn(4, 8), rows_0D, weight_TK, none, None)
    assert torch.equal(grad_TK, torch.zeros(4, 2))
    assert ops.activate("swiglu", torch.empty(0, 8)).shape == (0, 4)


def test_shapes_are_those_of_the_kernels() -> None:
    """The plan knows only what the shape functions say."""
    there, weight_TK = permutation("padded")
    x_TD, rows_RD = torch.randn(TOKENS, 8), torch.randn(len(there.assignment_R), 8)
    calls: dict[str, tuple[Any, ...]] = {
        "gather_rows": (x_TD, there.token_R, there.filled_R),
        "sum_rows": (rows_RD, there.row_TK, weight_TK, there.keep_TK),
        "sum_rows_backward": (x_TD, rows_RD, weight_TK, there.assignment_R, there.filled_R),
        "activate": ("geglu", rows_RD),
        "activate_backward": ("geglu", rows_RD, rows_RD[:, :4].contiguous()),
    }
    assert list(calls) == [schema.partition("(")[0] for schema, *_ in OPERATORS]
    for name, given in calls.items():
        results = []
        for device in ("cpu", "meta"):
            moved = [v.to(device) if isinstance(v, Tensor) else v for v in given]
            made = getattr(torch.ops.dmoe, name)(*moved)
            made = made if isinstance(made, tuple) else (made,)
            results.append([(part.shape, part.dtype, part.stride()) for part in made])
        assert results[0] == results[1], name


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are gathered and computed in steps, as on a GPU, not expert by expert."""

    def in_steps(kind: str, rows: Tensor, *more: Any) -> Tensor:
        *weights, recompute, send_gradient, kernels = more
        assert send_gradient is None
        return grouped_mlp.feed_forward_in_steps(kind, rows, *weights, recompute, kernels)

    monkeypatch.setattr(grouped_mlp, "feed_forward", in_steps)
    monkeypatch.setattr(grouped_mlp.MLPExperts, "takes_tokens", False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("factor", "exchange", "pool"),
    [(None, "packed", 1), (0.6, "packed", 1), (0.6, "padded", 1), (0.6, "padded", 2)],
)
def test_a_layer_is_the_same(
    factor: float | None, exchange: str, pool: int, recompute: bool, as_on_a_gpu: None
) -> None:
    results = []
    for kernels in ("torch", "triton"):
        capacity = CapacityConfig(factor=factor, pool=pool)
        layer = MoE(12, 20, 4, 2, capacity=capacity, exchange=exchange, kernels=kernels).double()
        layer.experts.recompute_activation = recompute
        x = torch.randn(3, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        with Counting() as called:
            output = layer(x)
            output.y.square().sum().backward()
        assert bool(called) == (kernels == "triton"), called
        results.append((output.y, x.grad, *(p.grad for p in layer.parameters())))
    for expected, got in zip(*results, strict=True):
        close(got, expected)


class Counting(TorchDispatchMode):
    """Collects which operators of this project are called."""

    def __enter__(self) -> Any:
        self.called: set[str] = set()
        super().__enter__()
        return self.called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dmoe":
            self.called.add(func.__name__)
        return func(*args, **(kwargs or {}))
