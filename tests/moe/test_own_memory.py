"""What a layer returns is memory of its own, and what its backward reads is not the caller's."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe import MoE
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.moe.routing import TokenContext
from tests.moe.layers import DIM, close, gradients, make, tokens_of

KINDS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"capacity": CapacityConfig(factor=1.0)},
    "padded": {"capacity": CapacityConfig(factor=1.0), "exchange": "padded"},
    "bias": {"balance": BalanceConfig(bias=0.1)},
    "one by one": {"experts": ExpertsConfig(shapes=[[4], [4], [3], [2], []])},
}


def bytes_of(tensor: Tensor) -> tuple[int, range]:
    """The memory of a tensor: its storage, and the bytes in it from its first to its last."""
    size, first = tensor.element_size(), tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((number - 1) * step for number, step in steps)
    return tensor.untyped_storage().data_ptr(), range(first * size, (last + 1) * size)


def overlap(one: Tensor, two: Tensor) -> bool:
    (storage, a), (other, b) = bytes_of(one), bytes_of(two)
    return storage == other and a.start < b.stop and b.start < a.stop


@pytest.mark.parametrize("kind", KINDS)
def test_a_count_shares_no_memory(kind: str) -> None:
    """Without drops `kept_E` was `choice_E`, both were the routing's and the bias's counts, and the
    zeros of every forward were one constant."""
    layer = make(**KINDS[kind])
    named: dict[str, Tensor] = {}
    for forward in ("first", "second"):
        output = layer(tokens_of(8))
        output.y.sum().backward()
        for field in fields(output.stats):
            value = getattr(output.stats, field.name)
            if isinstance(value, Tensor):
                named[f"{forward} {field.name}"] = value
        named[f"{forward} counts"] = output.routing.choice_count()
    named |= dict(layer.named_buffers()) | dict(layer.named_parameters())
    named |= {str(key): value for key, value in layer.ranges.longest.items()}
    if layer.pending_counts is not None and layer.pending_counts.count_E is not None:
        named["counts for the bias"] = layer.pending_counts.count_E
    shared = [pair for pair in combinations(named, 2) if overlap(*(named[name] for name in pair))]
    assert not shared
    assert len(named) > 12


def test_sums_in_place_do_not_move_the_bias() -> None:
    """`total = first.stats.choice_E; total += second.stats.choice_E` before the backward, or after
    it, made `update_bias` count the second forward twice."""
    biases = []
    for adds in (False, True):
        layer = make(balance=BalanceConfig(bias=0.1, recenter=False))
        first, second = layer(tokens_of(8)), layer(tokens_of(8, seed=1) + 2.0)
        total, expected = first.stats.choice_E, first.stats.choice_E + 100 * second.stats.choice_E
        if adds:
            total += 100 * second.stats.choice_E
        first.y.sum().backward()
        if adds:
            assert torch.equal(total, expected)
            assert torch.equal(first.stats.kept_E, first.routing.choice_count()[0])
            total += 100 * second.stats.choice_E
        layer.update_bias()
        biases.append(layer.balance_bias.clone())
    assert torch.equal(*biases)
    assert biases[0].any()


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_may_be_filled_again_before_the_backward(kind: str, replayed: bool) -> None:
    """As a loop with one mask buffer does, of two forwards before one backward: without drops the
    backward read the buffer, and gradients were those of other tokens, without a word."""
    found = []
    for fills in (False, True):
        layer, x = make(**KINDS[kind]), tokens_of(8)
        valid_T = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
        given_LTK = torch.arange(16).view(1, 8, 2) % 5 if replayed else None
        output = layer(x, TokenContext(valid_T=valid_T, given_expert_LTK=given_LTK))
        loss = output.y.square().sum() + sum(output.aux.values())
        if fills:
            valid_T.logical_not_()
        loss.backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_sentence_about_a_token_has_the_bias_of_its_forward() -> None:
    """The budget router's order was read from the buffer, which the next update moves."""
    shapes = [[4], [4], [3], [2], []]
    layer = make(
        router=RouterConfig(kind="budget", budget=0.5, renormalize=False),
        experts=ExpertsConfig(shapes=shapes),
        balance=BalanceConfig(bias=0.5),
    )
    usage = layer(tokens_of(8)).compute_usage
    before = [usage.of_token(token) for token in range(8)]
    layer.balance_bias.copy_(torch.tensor([-9.0, 9.0, -5.0, 5.0, 0.0]))
    assert [usage.of_token(token) for token in range(8)] == before
    moved = replace(usage, bias_E=layer.balance_bias)
    assert [moved.of_token(token) for token in range(8)] != before


def test_the_output_may_be_changed_in_place() -> None:
    """And the gradients are those of the layer."""
    layer, x = make(experts=ExpertsConfig(shared=1)), tokens_of(8)
    _, plain = gradients(layer, x)
    layer.zero_grad()
    x.grad = None
    output = layer(x)
    direction = torch.arange(1.0, output.y.numel() + 1, dtype=torch.float64).mul(0.7).sin()
    total = (output.y.mul_(2.0).flatten() * direction).sum() / 2
    for position, name in enumerate(sorted(output.aux)):
        total = total + (0.3 + position) * output.aux[name]
    total.backward()
    close(x.grad, plain["x"])


def test_zeros_stay_zeros_in_every_precision() -> None:
    """The weight of what was dropped is the bits of an integer 0 in the dtype of the weights."""
    for dtype in (torch.float32, torch.float64):
        stats = MoE(DIM, 4, 5, 2).to(dtype)(torch.randn(8, DIM, dtype=dtype)).stats
        assert stats.dropped_weight.dtype == stats.total_weight.dtype == dtype
        assert stats.dropped_weight.shape == stats.fully_dropped_tokens.shape == ()
        assert float(stats.dropped_weight) == int(stats.fully_dropped_tokens) == 0
        assert torch.equal(stats.choice_E, stats.kept_E)
