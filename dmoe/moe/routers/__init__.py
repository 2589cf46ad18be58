"""One router a file; `build` is the registry.

learned:     top_k, noisy, group_limited, adaptive, soft, expert_choice, budget (shared: learned.py, spare.py, noise.py)
unlearned:   fixed, hashed (shared: unlearned.py)
"""

from __future__ import annotations

from dmoe.config.rules import check_router
from dmoe.config.schema import RouterConfig
from dmoe.moe.routers.adaptive import AdaptiveRouter
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routers.budget import BudgetRouter
from dmoe.moe.routers.dense import DenseRouter
from dmoe.moe.routers.expert_choice import ExpertChoiceRouter
from dmoe.moe.routers.learned import LearnedRouter
from dmoe.moe.routers.noisy import NoisyRouter
from dmoe.moe.routers.static import FixedRouter, HashRouter
from dmoe.moe.routers.topk import GroupLimitedRouter, TopKRouter

__all__ = ["LEARNED", "UNLEARNED", "LearnedRouter", "RouterModule", "TopKRouter", "build"]

LEARNED: dict[str, type[LearnedRouter]] = {
    "top_k": TopKRouter,
    "noisy": NoisyRouter,
    "group_limited": GroupLimitedRouter,
    "adaptive": AdaptiveRouter,
    "soft": DenseRouter,
    "expert_choice": ExpertChoiceRouter,
    "budget": BudgetRouter,
}
UNLEARNED: dict[str, type[RouterModule]] = {"fixed": FixedRouter, "hash": HashRouter}


def build(config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int) -> RouterModule:
    """The router that `config.kind` names, for tokens of width `dim`. Raises ConfigError for settings that mean nothing."""
    check_router(config, num_experts, top_k)
    if config.kind in UNLEARNED:
        return UNLEARNED[config.kind](config, num_experts, top_k, layer)
    return LEARNED[config.kind](config, dim, num_experts, top_k, layer)
