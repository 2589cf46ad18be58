"""Combinations of capacity, balance and router that cannot mean anything are refused, with the field's name and a way out."""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.verify.shrink import prepare, shrink

FACTOR = "moe.capacity.factor=1.0"
NEXT = "moe.capacity.overflow=next_choice"
EXPERT_CHOICE = ["moe.router.kind=expert_choice", "moe.router.allow_future_leak=true"]
ADAPTIVE = ["moe.router.kind=adaptive", "moe.router.renormalize=false"]
MIXED = ["moe.experts.shapes=[[],[50],[64,32]]", "moe.num_experts=3"]
BUDGET = ["moe.router.kind=budget", "moe.router.renormalize=false"]
UNORDERED = [
    ["moe.router.kind=fixed"],
    ["moe.router.kind=hash"],
    ["moe.router.kind=soft", "moe.top_k=8"],
    EXPERT_CHOICE,
]

REFUSED = [
    (["moe.balance.load=0.1"], "moe.balance.load", "noisy"),
    (["moe.balance.load=0.1", *ADAPTIVE], "moe.balance.load", "noisy"),
    ([NEXT], "moe.capacity.overflow", "capacity"),
    ([NEXT, FACTOR, "moe.num_experts=2"], "moe.capacity.overflow", "all of them"),
    (
        ["moe.capacity.renormalize=true", "moe.top_k=1", "moe.router.renormalize=false"],
        "moe.capacity.renormalize",
        "gradient",
    ),
    (["moe.capacity.renormalize=true", *ADAPTIVE], "moe.capacity.renormalize", "k_min=1"),
    *[([NEXT, FACTOR, *router], "moe.capacity.overflow", "next expert") for router in UNORDERED],
    *[(["moe.balance.bias=0.001", *router], "moe.balance.bias", "router") for router in UNORDERED],
    *[
        ([f"moe.balance.{name}=-0.1"], f"moe.balance.{name}", "must not be negative")
        for name in ("switch", "z", "importance", "load", "usage_std", "bias")
    ],
    ([*BUDGET[:1]], "moe.router.renormalize", "weight 1"),
    ([*BUDGET, "moe.router.budget=0"], "moe.router.budget", "at most 1"),
    ([*BUDGET, "moe.router.budget=1.5"], "moe.router.budget", "at most 1"),
    ([*BUDGET, "moe.router.min_weight=1"], "moe.router.min_weight", "less than 1"),
    ([*BUDGET, "moe.router.budget=0.1"], "moe.router.budget", "0.125 of all"),
    ([*BUDGET, *MIXED, "moe.router.budget=0.1"], "moe.router.budget", "nothing would ever run"),
    ([*BUDGET, "moe.router.per=sequence"], "moe.router.per", "later tokens"),
    ([*BUDGET, "moe.capacity.renormalize=true", FACTOR], "moe.capacity.renormalize", "alone 1"),
    ([*BUDGET, NEXT, FACTOR], "moe.capacity.overflow", "budget affords"),
    ([*BUDGET, "moe.router.score=sigmoid"], "moe.router.score", "no meaning"),
    (["moe.router.budget=0.5"], "moe.router.budget", "only for budget"),
    (["moe.router.min_weight=0.2"], "moe.router.min_weight", "only for budget"),
    (["moe.router.per=sequence"], "moe.router.per", "only for budget"),
    (MIXED[:1], "moe.num_experts", "number of moe.experts.shapes, 3"),
    ([*MIXED[1:], "moe.experts.shapes=[[],[0],[5]]"], "moe.experts.shapes", "from 1 to"),
    ([*MIXED[1:], "moe.experts.shapes=[[],5,[5]]"], "moe.experts.shapes", "lists of whole numbers"),
    (
        [*MIXED[1:], "moe.experts.shapes=[[],[1.5],[5]]"],
        "moe.experts.shapes",
        "lists of whole numbers",
    ),
    ([*MIXED, "model.dense_first=1"], "model.dense_dim", "dense blocks"),
    ([*MIXED, "parallel.ep=2"], "parallel.ep", "divide the world"),
    (["moe.experts.zero=-1"], "moe.experts.zero", "must not be negative"),
    (["moe.experts.copy=1", NEXT, FACTOR], "moe.capacity.overflow", "no queue"),
    (["moe.experts.constant=1", "moe.top_k=10"], "moe.top_k", "9 experts, zero-cost ones included"),
    *[
        (["moe.experts.zero=1", *router], "moe.experts.zero", "have no meaning")
        for router in [UNORDERED[0], UNORDERED[1], EXPERT_CHOICE]
    ],
    (["moe.capacity.factor=0"], "moe.capacity.factor", "greater than 0"),
    (["moe.capacity.eval_factor=-1"], "moe.capacity.eval_factor", "greater than 0"),
    (["moe.capacity.min_capacity=0"], "moe.capacity.min_capacity", "1 or more"),
]

ALLOWED = [
    ["moe.balance.load=0.1", "moe.router.kind=noisy"],
    [NEXT, FACTOR],
    [NEXT, "moe.capacity.eval_factor=1.5"],
    [NEXT, FACTOR, *ADAPTIVE, "moe.top_k=8"],
    ["moe.capacity.renormalize=true", FACTOR],
    ["moe.capacity.group=global", FACTOR, "moe.exchange=padded", "moe.capacity.priority=score"],
    ["moe.balance.bias=0.001", "moe.router.score=sigmoid"],
    [*BUDGET, *MIXED, "moe.router.budget=0.5", FACTOR],
    [*BUDGET, "moe.experts.zero=1", "moe.router.budget=0.01"],
    [*BUDGET, "moe.router.per=sequence", "moe.router.allow_future_leak=true"],
    [*MIXED, "model.dense_first=1", "model.dense_dim=64"],
    ["moe.experts.zero=1", "moe.experts.copy=1", "moe.experts.constant=2", "moe.top_k=12"],
    ["moe.balance.importance=0.1", "moe.balance.usage_std=0.1", "moe.balance.bias=0.001"],
]


def text(item: object) -> str | None:
    return " ".join(i.removeprefix("moe.") for i in item) if isinstance(item, list) else None


@pytest.mark.parametrize(("overrides", "field", "reason"), REFUSED, ids=text)
def test_refused(overrides: list[str], field: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check(load(None, overrides))
    assert caught.value.field == field


@pytest.mark.parametrize("overrides", ALLOWED, ids=text)
def test_allowed(overrides: list[str]) -> None:
    check(load(None, overrides))


def test_what_can_be_trained_can_be_verified() -> None:
    """Verification trains narrow layers, where a linear expert costs a larger share of all: a budget that afforded it did so no more,
    and `dmoe verify` refused a config that `dmoe train` takes."""
    config = load(
        None,
        [
            *BUDGET,
            "moe.experts.shapes=[[],[1024]]",
            "moe.num_experts=2",
            "moe.top_k=2",
            "moe.router.budget=0.1",
        ],
    )
    check(config)
    check(prepare(shrink(config), 2))
    assert shrink(load(None, [*BUDGET, *MIXED, "moe.router.budget=0.7"])).moe.router.budget == 0.7
