"""Settings that mean nothing are refused, each with its field and a fix; settings that mean something are not."""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules import check, check_router
from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import build

KIND = "moe.router.kind="

REFUSED = {
    "a jitter that flips signs": (["moe.router.jitter=1.0"], "moe.router.jitter"),
    "a negative jitter": (["moe.router.jitter=-0.1"], "moe.router.jitter"),
    "jitter of fixed": ([KIND + "fixed", "moe.router.jitter=0.1"], "moe.router.jitter"),
    "jitter of hash": ([KIND + "hash", "moe.router.jitter=0.1"], "moe.router.jitter"),
    "sigmoid soft": ([KIND + "soft", "moe.top_k=8", "moe.router.score=sigmoid"], "moe.router.score"),
    "sigmoid noisy": ([KIND + "noisy", "moe.router.score=sigmoid"], "moe.router.score"),
    "sigmoid adaptive": ([KIND + "adaptive", "moe.router.score=sigmoid"], "moe.router.score"),
    "sigmoid fixed": ([KIND + "fixed", "moe.router.score=sigmoid"], "moe.router.score"),
    "sigmoid expert_choice": (
        [KIND + "expert_choice", "moe.router.allow_future_leak=true", "moe.router.score=sigmoid"], "moe.router.score"
    ),
    "weights of noisy": ([KIND + "noisy", "moe.router.weights_from=chosen"], "moe.router.weights_from"),
    "weights of hash": ([KIND + "hash", "moe.router.weights_from=chosen"], "moe.router.weights_from"),
    "groups of top_k": (["moe.router.groups=4"], "moe.router.groups"),
    "topk_groups of top_k": (["moe.router.topk_groups=4"], "moe.router.topk_groups"),
    "top_p of top_k": (["moe.router.top_p=0.5"], "moe.router.top_p"),
    "k_min of top_k": (["moe.router.k_min=2"], "moe.router.k_min"),
    "leak of top_k": (["moe.router.allow_future_leak=true"], "moe.router.allow_future_leak"),
    "groups that do not divide": ([KIND + "group_limited", "moe.router.groups=3"], "moe.router.groups"),
    "no groups": ([KIND + "group_limited", "moe.router.groups=0"], "moe.router.groups"),
    "too many topk_groups": ([KIND + "group_limited", "moe.router.groups=4", "moe.router.topk_groups=5"], "moe.router.topk_groups"),
    "no topk_groups": ([KIND + "group_limited", "moe.router.groups=4", "moe.router.topk_groups=0"], "moe.router.topk_groups"),
    "too few eligible": ([KIND + "group_limited", "moe.router.groups=4", "moe.top_k=3"], "moe.top_k"),
    "top_p 0": ([KIND + "adaptive", "moe.router.renormalize=false", "moe.router.top_p=0"], "moe.router.top_p"),
    "top_p 1.1": ([KIND + "adaptive", "moe.router.renormalize=false", "moe.router.top_p=1.1"], "moe.router.top_p"),
    "k_min above top_k": ([KIND + "adaptive", "moe.router.k_min=3"], "moe.router.k_min"),
    "k_min 0": ([KIND + "adaptive", "moe.router.k_min=0"], "moe.router.k_min"),
    "adaptive, one expert of weight 1": ([KIND + "adaptive"], "moe.router.renormalize"),
    "adaptive, softmax over one": (
        [KIND + "adaptive", "moe.router.renormalize=false", "moe.router.weights_from=chosen"], "moe.router.weights_from"
    ),
    "one renormalised": (["moe.top_k=1"], "moe.router.renormalize"),
    "one renormalised of a group": (
        [KIND + "group_limited", "moe.router.groups=4", "moe.top_k=1"], "moe.router.renormalize"
    ),
    "softmax over one": (
        ["moe.top_k=1", "moe.router.renormalize=false", "moe.router.weights_from=chosen"], "moe.router.weights_from"
    ),
    "noisy with one": ([KIND + "noisy", "moe.top_k=1", "moe.router.renormalize=false"], "moe.top_k"),
    "soft with two": ([KIND + "soft"], "moe.top_k"),
    "soft without room": ([KIND + "soft", "moe.top_k=8", "moe.capacity.factor=0.5"], "moe.capacity.factor"),
    "soft without room in evaluation": ([KIND + "soft", "moe.top_k=8", "moe.capacity.eval_factor=0.5"], "moe.capacity.eval_factor"),
    "expert_choice": ([KIND + "expert_choice"], "moe.router.kind"),
    "expert_choice over ranks": (
        [KIND + "expert_choice", "moe.router.allow_future_leak=true", "moe.capacity.group=global", "moe.capacity.factor=1.0"],
        "moe.capacity.group",
    ),
    "expert_choice with a next choice": (
        [
            KIND + "expert_choice", "moe.router.allow_future_leak=true", "moe.capacity.overflow=next_choice",
            "moe.capacity.factor=1.0",
        ],
        "moe.capacity.overflow",
    ),
}  # fmt: skip

ALLOWED = {
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
    "soft": [KIND + "soft", "moe.top_k=8", "moe.capacity.factor=1.0", "moe.exchange=padded"],
    "expert_choice": [
        KIND + "expert_choice",
        "moe.router.allow_future_leak=true",
        "moe.capacity.group=sequence",
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused(name: str) -> None:
    overrides, field = REFUSED[name]
    with pytest.raises(ConfigError, match=r": .+; .+") as error:
        check(load(None, overrides))
    assert error.value.field == field, str(error.value)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_means_something_is_allowed(name: str) -> None:
    config = load(None, ALLOWED[name])
    check(config)
    build(config.moe.router, 16, config.moe.num_experts, config.moe.top_k, 0)


def test_a_layer_is_told_the_same() -> None:
    with pytest.raises(
        ValueError,
        match=r"moe.router.groups=3: must divide moe.num_experts=8; use one of \[1, 2, 4, 8\]",
    ):
        build(RouterConfig(kind="group_limited", groups=3), 16, 8, 2, 0)


def test_the_reason_is_named() -> None:
    with pytest.raises(ConfigError, match=r"later tokens.*allow_future_leak=true"):
        check(load(None, [KIND + "expert_choice"]))
    with pytest.raises(
        ConfigError, match=r"has no meaning for moe.router.kind=hash, only for top_k, noisy"
    ):
        check_router(RouterConfig(kind="hash", jitter=0.1), 8, 2)
