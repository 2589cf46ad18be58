"""The settings of a router, whatever the layer around it: which kind reads which, and what would teach it nothing."""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.schema import RouterConfig

WITHOUT_ORDER = ("fixed", "hash", "soft", "expert_choice")
"""Routers that do not rank a token's experts by score: they have no next choice, and nothing that a bias could move."""


READ_BY = {
    "score": ("top_k", "group_limited"),
    "weights_from": ("top_k", "group_limited", "adaptive"),
    "jitter": ("top_k", "noisy", "group_limited", "adaptive", "soft", "expert_choice", "budget"),
    "groups": ("group_limited",),
    "topk_groups": ("group_limited",),
    "top_p": ("adaptive",),
    "k_min": ("adaptive",),
    "min_weight": ("budget",),
    "budget": ("budget",),
    "per": ("budget",),
    "allow_future_leak": ("expert_choice", "budget"),
}
"""Fields that only some kinds read. Not renormalize: who comes from top_k=1 has it at false, which is harmless everywhere."""


def check_router(router: RouterConfig, num_experts: int, top_k: int) -> None:
    """Refuse settings of a router that mean nothing, whatever the layer around it. Raises ConfigError."""
    for field, kinds in READ_BY.items():
        if getattr(router, field) != getattr(RouterConfig(), field) and router.kind not in kinds:
            allowed = (
                f"has no meaning for moe.router.kind={router.kind}, only for {', '.join(kinds)}"
            )
            raise ConfigError(
                f"moe.router.{field}",
                getattr(router, field),
                allowed,
                f"leave moe.router.{field} out",
            )
    if not 0 <= router.jitter < 1:
        raise ConfigError(
            "moe.router.jitter",
            router.jitter,
            "must be at least 0 and less than 1",
            "Switch used 0.01",
        )
    _starved(router, top_k)
    if router.kind == "group_limited":
        _groups(router, num_experts, top_k)
    elif router.kind == "adaptive":
        _adaptive(router, top_k)
    elif router.kind == "budget":
        _budget(router)
    elif router.kind == "soft" and top_k != num_experts:
        allowed = f"must be moe.num_experts={num_experts} for moe.router.kind=soft, which sends a token to every expert"
        raise ConfigError("moe.top_k", top_k, allowed, f"use {num_experts}")


def _starved(router: RouterConfig, top_k: int) -> None:
    """A weight that is 1 whatever the logits are sends the router no gradient."""
    if router.kind == "noisy" and top_k == 1:
        allowed = (
            "with moe.router.kind=noisy makes every weight 1 and starves the router of gradient"
        )
        raise ConfigError(
            "moe.top_k",
            1,
            allowed,
            "use 2 or more, or moe.router.kind=top_k with moe.router.jitter",
        )
    if router.kind not in ("top_k", "group_limited") or top_k > 1:
        return
    allowed = "with moe.top_k=1 makes every weight 1 and starves the router of gradient"
    if router.renormalize:
        raise ConfigError("moe.router.renormalize", True, allowed, "set it to false")
    if router.weights_from == "chosen" and router.score == "softmax":
        raise ConfigError("moe.router.weights_from", "chosen", allowed, "use all")


def _groups(router: RouterConfig, num_experts: int, top_k: int) -> None:
    if router.groups < 1 or num_experts % router.groups:
        fits = f"use one of {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}"
        raise ConfigError(
            "moe.router.groups", router.groups, f"must divide moe.num_experts={num_experts}", fits
        )
    if not 1 <= router.topk_groups <= router.groups:
        allowed = f"must be between 1 and moe.router.groups={router.groups}"
        raise ConfigError(
            "moe.router.topk_groups", router.topk_groups, allowed, f"use {router.groups} or less"
        )
    eligible = router.topk_groups * num_experts // router.groups
    if top_k > eligible:
        allowed = f"must be at most the {eligible} experts of moe.router.topk_groups={router.topk_groups} groups"
        raise ConfigError(
            "moe.top_k", top_k, allowed, f"use {eligible} or less, or more topk_groups"
        )


def _adaptive(router: RouterConfig, top_k: int) -> None:
    if not 0 < router.top_p <= 1:
        raise ConfigError(
            "moe.router.top_p", router.top_p, "must be greater than 0 and at most 1", "use 0.6"
        )
    if not 1 <= router.k_min <= top_k:
        raise ConfigError(
            "moe.router.k_min",
            router.k_min,
            f"must be from 1 to moe.top_k={top_k}",
            f"use {top_k} or less",
        )
    allowed = "with moe.router.k_min=1 gives a token of one expert weight 1, from which its router learns nothing"
    for field, chosen, fix in (("renormalize", True, "false"), ("weights_from", "chosen", "all")):
        if router.k_min == 1 and getattr(router, field) == chosen:
            raise ConfigError(
                f"moe.router.{field}", chosen, allowed, f"set it to {fix}, or moe.router.k_min=2"
            )


def _budget(router: RouterConfig) -> None:
    if router.renormalize:
        allowed = "with moe.router.kind=budget gives a token of one expert weight 1, from which its router learns nothing"
        raise ConfigError("moe.router.renormalize", True, allowed, "set it to false")
    if not 0 < router.budget <= 1:
        raise ConfigError(
            "moe.router.budget",
            router.budget,
            "must be greater than 0 and at most 1",
            "use 1.0 for no limit",
        )
    if not 0 <= router.min_weight < 1:
        raise ConfigError(
            "moe.router.min_weight",
            router.min_weight,
            "must be at least 0 and less than 1",
            "use 0.1",
        )
