"""What every router is: a module that turns token vectors, and what is known of the tokens, into a `Routing`.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.config.schema import RouterConfig
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["RouterModule", "valid_choices", "per_token_input", "router_dtype"]


class RouterModule(nn.Module):
    """A router. `forward` makes no collective and no host read: every shape it returns follows from shapes alone."""

    def __init__(self, config: RouterConfig, num_experts: int, top_k: int, layer: int = 0) -> None:
        super().__init__()
        self.config, self.num_experts, self.layer = config, num_experts, layer
        self.top_k = top_k
        """Experts a token goes to: exactly, at most (adaptive) or on average (expert_choice). What costs are computed from."""

    def initialize(self, seed: int, layer: int, std: float) -> None:
        """Draw the weights anew; a router without parameters has nothing to draw."""

    def set_expert_costs(self, work: Sequence[int]) -> None:
        """What a row costs with each expert, in multiply-adds. Only a router with a budget asks."""

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        raise NotImplementedError


def router_dtype(x: Tensor) -> torch.dtype:
    """float32 for every model precision but float64, which keeps its own (so that `verify` can compare at 1e-10)."""
    return torch.promote_types(x.dtype, torch.float32)


def valid_choices(expert_TK: Tensor, context: TokenContext) -> Tensor | None:
    """bool [T, K]: padding chooses nothing. None where there is no padding, which spares the dispatcher a mask."""
    return None if context.valid_T is None else context.valid_T.unsqueeze(1).expand_as(expert_TK)


def per_token_input(value_T: Tensor | None, x_TD: Tensor, kind: str, field: str, meaning: str) -> Tensor:
    """`value_T` if it holds one number for each token; a ValueError that says what is missing otherwise."""
    if value_T is None:
        raise ValueError(f"router.kind={kind} needs the {meaning} of each token: pass TokenContext({field}=int64 tensor [T])")
    if value_T.shape != x_TD.shape[:1]:
        raise ValueError(f"{field} has shape {list(value_T.shape)}: must be [{x_TD.shape[0]}], one {meaning} for each token")
    return value_T
