"""Configs that look unusual and work: they pass the rules, and their router can be built."""

from __future__ import annotations

import pytest

from dmoe.config.load import load
from dmoe.config.rules import check
from dmoe.moe.routers import build_router
from dmoe.verify.cases import prepare, shrink

KIND = "moe.router.kind="
FACTOR = "moe.capacity.factor=1.0"
NEXT = "moe.capacity.overflow=next_choice"
ADAPTIVE = ["moe.router.kind=adaptive", "moe.router.renormalize=false"]
MIXED = ["moe.experts.shapes=[[],[50],[64,32]]", "moe.num_experts=3"]
BUDGET = ["moe.router.kind=budget", "moe.router.renormalize=false"]

ROUTERS = {
    "jitter": ["moe.router.jitter=0.01"],
    "switch": ["moe.top_k=1", "moe.router.renormalize=false"],
    "sigmoid over one": [
        "moe.top_k=1",
        "moe.router.renormalize=false",
        "moe.router.weights_from=chosen",
        "moe.router.score=sigmoid",
    ],
    "noisy": [KIND + "noisy", "moe.router.jitter=0.1", "moe.balance.load=0.1"],
    "deepseek": [
        KIND + "group_limited",
        "moe.router.score=sigmoid",
        "moe.router.groups=4",
        "moe.router.topk_groups=2",
    ],
    "adaptive": [KIND + "adaptive", "moe.router.renormalize=false", "moe.router.top_p=1.0"],
    "adaptive from two": [KIND + "adaptive", "moe.router.k_min=2", "moe.top_k=4"],
    "fixed": [KIND + "fixed"],
    "fixed with one": [KIND + "fixed", "moe.top_k=1"],
    "hash": [KIND + "hash", "moe.top_k=1"],
    "workload": [KIND + "workload", "moe.router.workload=W2", "moe.router.hot=4", "moe.top_k=1"],
    "soft": [KIND + "soft", "moe.top_k=8", "moe.capacity.factor=1.0", "moe.exchange=padded"],
    "expert_choice": [
        KIND + "expert_choice",
        "moe.router.allow_future_leak=true",
        "moe.capacity.group=sequence",
    ],
}

LAYERS = [
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


@pytest.mark.parametrize("name", ROUTERS)
def test_router_accepted(name: str) -> None:
    config = load(None, ROUTERS[name])
    check(config)
    build_router(config.moe.router, 16, config.moe.num_experts, config.moe.top_k, 0)


@pytest.mark.parametrize("overrides", LAYERS, ids=" ".join)
def test_layer_accepted(overrides: list[str]) -> None:
    check(load(None, overrides))


def test_config_that_trains_can_be_verified() -> None:
    """`dmoe verify` takes every config that `dmoe train` takes.

    It trains narrow layers, where a linear expert costs a larger share of all experts, so that a
    budget may no longer afford it.
    """
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
