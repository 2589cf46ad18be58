"""A router for more modules than before. What it knew of the others keeps its bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.routing.learned import PerSequence, PerTask
from dmoe.modular.routing.tables import ConstantRouter, TableRouter
from dmoe.moe.rng import normal_
from dmoe.moe.routers.adaptive import AdaptiveRouter
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routers.dense import DenseRouter
from dmoe.moe.routers.static import FixedRouter
from dmoe.moe.routers.topk import TopKRouter

LEARNED = TopKRouter | AdaptiveRouter | DenseRouter


def check_grows(router: RouterModule) -> None:
    """Raises ConfigError for a router whose old choices would become others (hash, group_limited, expert_choice, noisy)."""
    if isinstance(router, PerSequence | PerTask):
        check_grows(router.router)
    elif not isinstance(router, LEARNED | ConstantRouter | TableRouter | FixedRouter):
        allowed = "would send old tokens to other modules if it grew"
        raise ConfigError(
            "router",
            type(router).__name__,
            allowed,
            "use top_k, soft, adaptive, fixed, a table or constant weights",
        )


def grow_router(router: RouterModule, count: int, seed: int, *, std: float = 0.02) -> None:
    """`count` more modules to choose from.

    A learned matrix gets `count` rows drawn for (seed, layer, id): the logits of the others stay as they are, but a softmax over
    more of them gives each a little less. A table keeps its rows (`add_row` gives the new module to a label); constant weights get
    zeros.

    Raises: ConfigError for a router that cannot grow (`check_grows`); it is as it was then.
    """
    check_grows(router)
    if isinstance(router, PerSequence | PerTask):
        grow_router(router.router, count, seed, std=std)
        router.num_experts, router.top_k = router.router.num_experts, router.router.top_k
        return
    first = router.num_experts
    if isinstance(router, LEARNED):
        new_ED = router.weight.new_empty(count, router.weight.shape[1])
        for row, new_D in enumerate(new_ED):
            normal_(new_D, std, seed, "router", router.layer, "grown", first + row)
        router.weight = nn.Parameter(
            torch.cat([router.weight.detach(), new_ED]), requires_grad=router.weight.requires_grad
        )
        router.bias_E = _with_zeros(router.bias_E, count)
    elif isinstance(router, ConstantRouter):
        router.weights += (0.0,) * count
        router.weight_M = _with_zeros(router.weight_M, count)
    router.num_experts = first + count
    if isinstance(router, DenseRouter | ConstantRouter):
        router.top_k = router.num_experts


def _with_zeros(value_E: Tensor, count: int) -> Tensor:
    return torch.cat([value_E, value_E.new_zeros(count)])
