"""Combinations of capacity, balance and router that cannot mean anything are refused, with the field's name and a way out."""

from __future__ import annotations

import pytest

from dmoe.config.check import check
from dmoe.config.errors import ConfigError
from dmoe.config.load import load

FACTOR = "moe.capacity.factor=1.0"
NEXT = "moe.capacity.overflow=next_choice"
EXPERT_CHOICE = ["moe.router.kind=expert_choice", "moe.router.allow_future_leak=true"]
ADAPTIVE = ["moe.router.kind=adaptive", "moe.router.renormalize=false"]
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
    (["moe.capacity.renormalize=true", "moe.top_k=1", "moe.router.renormalize=false"], "moe.capacity.renormalize", "gradient"),
    (["moe.capacity.renormalize=true", *ADAPTIVE], "moe.capacity.renormalize", "k_min=1"),
    *[([NEXT, FACTOR, *router], "moe.capacity.overflow", "next expert") for router in UNORDERED],
    *[(["moe.balance.bias=0.001", *router], "moe.balance.bias", "router") for router in UNORDERED],
    *[
        ([f"moe.balance.{name}=-0.1"], f"moe.balance.{name}", "must not be negative")
        for name in ("switch", "z", "importance", "load", "usage_std", "bias")
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
