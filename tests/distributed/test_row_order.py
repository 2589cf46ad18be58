"""Rows that stay in the order of arrival: the bits of rows that are grouped by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.config.schema import CapacityConfig, ExchangeConfig
from dmoe.distributed.all_to_all import PackedAllToAll
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.distributed.padded_all_to_all import PaddedAllToAll
from dmoe.distributed.placement.copies import CopyingAllToAll
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.moe.layer import MoE
from dmoe.moe.routing import DispatchPlan
from tests.ranks import run_ranks

LIMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("packed", {"factor": None}),
    "packed with drops": ("packed", {"factor": 0.8}),
    "padded": ("padded", {"factor": 1.25}),
    "padded by sequence": ("padded", {"factor": 0.8, "group": "sequence"}),
    "pooled": ("padded", {"factor": 1.25, "pool": 2}),
}


class Passes(TorchDispatchMode):
    """Counts the operators that copy as many rows as the experts are given."""

    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.numbers, self.count = 0, 0
        experts.register_forward_pre_hook(self.note)

    def note(self, module: torch.nn.Module, inputs: Any) -> None:
        self.numbers = inputs[0].numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = func.__name__.split(".")[0] in ("index_select", "clone")
        self.count += copies and out.numel() == self.numbers
        return out


def run_layer(
    rank: int, world: int, limits: str, recompute: bool, dtype: torch.dtype, takes_order: bool
) -> tuple[list[torch.Tensor], int]:
    """Return the output and all gradients of a layer, and the passes over all rows after routing.

    A second forward and backward counts them: the first one learns how many rows arrive.
    """
    exchange, capacity = LIMITS[limits]
    MLPExperts.takes_order = takes_order
    layer = MoE(16, 24, 8, 3, exchange=exchange, capacity=CapacityConfig(**capacity)).to(dtype)
    layer.initialize(0, 0.5, 0.5)
    shard_experts(layer, build_mesh(world, torch.device("cpu")))
    layer.recompute_experts = recompute
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(rank)).to(dtype)
    x.requires_grad_()
    passes = Passes(layer.experts)
    for _ in range(2):
        layer.zero_grad()
        x.grad, passes.count = None, 0
        with passes:
            y = layer(x).y
            y.square().sum().backward()
    grads = [weight.grad for weight in layer.parameters()]
    assert x.grad is not None
    return [y.detach(), x.grad, *(grad for grad in grads if grad is not None)], passes.count


def both_orders(rank: int, world: int, *options: Any) -> tuple[list[bool], tuple[int, int]]:
    """Compare the results bit for bit, and return the passes of both."""
    (mine, few), (grouped, more) = (run_layer(rank, world, *options, o) for o in (True, False))
    return [torch.equal(a, b) for a, b in zip(mine, grouped, strict=True)], (few, more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("limits", LIMITS)
def test_rows_in_the_order_of_arrival_change_no_bit(
    limits: str, recompute: bool, dtype: torch.dtype
) -> None:
    """Output, and the gradients of the input, the router and the experts; four passes less.

    Two passes over new memory each way are a tenth of a padded layer with fine experts.
    """
    for equal, (few, more) in run_ranks(2, both_orders, limits, recompute, dtype):
        assert equal == [True] * 5
        assert more - few == 4


def test_a_dispatcher_with_a_dispatch_of_its_own_is_asked_for_it() -> None:
    """A subclass that changed `dispatch` alone would be passed by in silence."""

    class Own(PackedAllToAll):
        def dispatch(self, x_TD: torch.Tensor, plan: DispatchPlan) -> Any:
            raise NotImplementedError

    class Combines(PackedAllToAll):
        def combine(self, rows_RD: torch.Tensor, weight_TK: torch.Tensor, metadata: Any) -> Any:
            raise NotImplementedError

    class Mixin:
        def dispatch(self, x_TD: torch.Tensor, plan: DispatchPlan) -> Any:
            raise NotImplementedError

    class Inherits(Mixin, PackedAllToAll):  # type: ignore[misc]
        pass

    class Declares(PackedAllToAll):
        sends_rows = False

    class Same(PackedAllToAll):
        pass

    assert PackedAllToAll.sends_rows
    assert PaddedAllToAll.sends_rows
    assert Same.sends_rows
    assert not any(
        changed.sends_rows for changed in (Own, Combines, Inherits, Declares, CopyingAllToAll)
    )


def test_experts_with_a_forward_from_another_class_get_grouped_rows() -> None:
    """A class before `MLPExperts` in the order of resolution does not know `order_R`."""

    class Mixin:
        def forward(self, rows_RD: torch.Tensor, tokens_per_expert: Any) -> torch.Tensor:
            return rows_RD

    class Inherits(Mixin, MLPExperts):  # type: ignore[misc]
        pass

    class Same(MLPExperts):
        pass

    flags = ("takes_chunks", "takes_copies", "takes_order", "takes_tokens", "sends_gradient")
    assert not any(getattr(Inherits, name) for name in flags)
    assert all(getattr(Same, name) for name in flags)


class Doubled(torch.nn.Module):
    """Experts that are no `Experts`."""

    def forward(self, rows_RD: torch.Tensor, tokens_per_expert: Any) -> torch.Tensor:
        return rows_RD * 2


def other_experts(rank: int, world: int, exchange: str) -> bool:
    """Return whether experts that know nothing of any order compute what they should."""
    padded = exchange == "padded"
    capacity = CapacityConfig(factor=8.0 if padded else None)
    layer = MoE(16, 24, 8, 3, exchange="padded" if padded else "packed", capacity=capacity)
    options = ExchangeConfig(overlap=exchange == "overlapped")
    shard_experts(layer, build_mesh(world, torch.device("cpu")), exchange=options)
    layer.experts = Doubled()
    x = torch.randn(2, 20, 16)
    # the weights of a token sum to 1
    return torch.allclose(layer(x).y, 2 * x, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("exchange", ["packed", "padded", "overlapped"])
def test_any_module_may_be_the_experts(exchange: str, ranks: int) -> None:
    """What a class does not declare is not asked of it.

    Each exchange read another attribute, so that packed raised on one process, and the others on
    two.
    """
    assert run_ranks(ranks, other_experts, exchange) == [True] * ranks


def backward_under_autocast(rank: int, world: int) -> list[torch.dtype]:
    """Return the dtypes of gradients of a float32 forward, whose backward is under autocast."""
    layer = MoE(16, 24, 8, 3)
    layer.initialize(0, 0.5, 0.5)
    shard_experts(layer, build_mesh(world, torch.device("cpu")))
    x = torch.randn(2, 20, 16, requires_grad=True)
    y = layer(x).y
    with torch.autocast("cpu", torch.bfloat16):
        y.square().sum().backward()
    return [leaf.grad.dtype for leaf in (x, *layer.parameters()) if leaf.grad is not None]


def test_a_backward_under_autocast_alone_keeps_the_dtypes() -> None:
    """The product that is written to places of rows was bfloat16 there, and the write an error."""
    assert run_ranks(2, backward_under_autocast) == [[torch.float32] * 4] * 2
