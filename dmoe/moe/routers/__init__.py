"""Routers: one class per router kind. `ROUTER_CLASSES` is the only table of kinds and classes.

A class of the user's own needs no entry (docs/plugins.md).

A new kind needs a row in `dmoe/config/router_kinds.py`, a file here with its entry below, a naive
twin in `dmoe/verify/naive/routing.py`, and a case in `tests/moe/routers/cases.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import construct, plugin_class
from dmoe.config.plugins import label
from dmoe.config.router_kinds import ROUTERS
from dmoe.config.rules import check_router
from dmoe.config.schema import RouterConfig
from dmoe.moe.routers.adaptive import AdaptiveRouter
from dmoe.moe.routers.base import LearnedRouter, RouterModule
from dmoe.moe.routers.budget import BudgetRouter
from dmoe.moe.routers.expert_choice import ExpertChoiceRouter
from dmoe.moe.routers.noisy import NoisyRouter
from dmoe.moe.routers.static import FixedRouter, HashRouter
from dmoe.moe.routers.topk import DenseRouter, GroupLimitedRouter, TopKRouter
from dmoe.moe.routers.workload import WorkloadRouter

__all__ = ["ROUTER_CLASSES", "LearnedRouter", "RouterModule", "TopKRouter", "build_router"]

ROUTER_CLASSES: dict[str, Callable[[RouterConfig, int, int, int, int], RouterModule]] = {
    "top_k": TopKRouter,
    "noisy": NoisyRouter,
    "group_limited": GroupLimitedRouter,
    "adaptive": AdaptiveRouter,
    "fixed": FixedRouter,
    "hash": HashRouter,
    "soft": DenseRouter,
    "expert_choice": ExpertChoiceRouter,
    "budget": BudgetRouter,
    "workload": WorkloadRouter,
}


def build_router(
    config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int
) -> RouterModule:
    """Build the router of `config.kind`.

    Args:
        config: section `moe.router`.
        dim: width D of a token.
        num_experts: E.
        top_k: K.
        layer: index among the MoE layers; part of the key of hashes and noise.

    Raises:
        ConfigError: impossible settings.
    """
    check_router(config, num_experts, top_k)
    assert set(ROUTER_CLASSES) == set(ROUTERS), "router_kinds.py and ROUTER_CLASSES differ"
    field, arguments = "moe.router.kind", (config, dim, num_experts, top_k, layer)
    if plugin_class(config.kind, field) is not None:
        made: RouterModule = construct(
            config.kind, field, *arguments, options=config.options, base=RouterModule
        )
        if made.spec is None and not isinstance(made, LearnedRouter):
            allowed = "must say what kind of router it is: spec = RouterSpec(...) in the class"
            raise ConfigError(field, label(config.kind), allowed, "see docs/plugins.md")
        return made
    return ROUTER_CLASSES[config.kind](config, dim, num_experts, top_k, layer)
