"""What every router is: a module that turns token vectors, and what is known of the tokens, into a `Routing`.

Letters: T tokens, D width, E experts, K experts a token.

The experts a token would take next, for `capacity.overflow: next_choice`.

An assignment that finds its expert full is offered to the token's next eligible expert, at the weight that one would have:
    weights_from: all      score[spare] / (sum of the chosen scores, if renormalised)
    weights_from: chosen   exp(logit[spare]) / sum over the chosen of exp(logit)
times `scale`: the same rule, and the same denominator, as the chosen ones have. So a token's weights need not sum to 1 after a swap,
exactly as they need not after a drop.

Cost: a gather and a few operations on [T, K]; only where there is a capacity, since without one nothing overflows.

Letters: T tokens, E experts, K experts a token, S spare experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dmoe.config.schema import RouterConfig
from dmoe.moe.routing import Routing, TokenContext


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


def per_token_input(
    value_T: Tensor | None, x_TD: Tensor, kind: str, field: str, meaning: str
) -> Tensor:
    """`value_T` if it holds one number for each token; a ValueError that says what is missing otherwise."""
    if value_T is None:
        raise ValueError(
            f"router.kind={kind} needs the {meaning} of each token: pass TokenContext({field}=int64 tensor [T])"
        )
    if value_T.shape != x_TD.shape[:1]:
        raise ValueError(
            f"{field} has shape {list(value_T.shape)}: must be [{x_TD.shape[0]}], one {meaning} for each token"
        )
    return value_T


def with_next_experts(
    routing: Routing,
    spare_TS: Tensor,
    config: RouterConfig,
    *,
    there_TS: Tensor | None = None,
    made_TK: Tensor | None = None,
) -> Routing:
    """`routing` with the experts `spare_TS`, best first, and their weights; -1 and weight 0 where `there_TS` says that there is none.

    `made_TK`: which of the chosen experts were really taken (adaptive); None is all.
    """
    weight_TS = next_weights(routing, spare_TS, config, made_TK)
    if there_TS is not None:
        spare_TS, weight_TS = (
            spare_TS.masked_fill(~there_TS, -1),
            weight_TS.masked_fill(~there_TS, 0.0),
        )
    return replace(routing, next_expert_TS=spare_TS, next_weight_TS=weight_TS)


def next_weights(
    routing: Routing, spare_TS: Tensor, config: RouterConfig, made_TK: Tensor | None
) -> Tensor:
    if config.score == "softmax" and config.weights_from == "chosen":
        chosen_TK = routing.logit_TE.gather(1, routing.expert_TK)
        if made_TK is not None:
            chosen_TK = chosen_TK.masked_fill(~made_TK, -math.inf)
        weight_TS = (
            routing.logit_TE.gather(1, spare_TS) - chosen_TK.logsumexp(-1, keepdim=True)
        ).exp()
        return (
            weight_TS * config.scale
        )  # the chosen ones sum to 1 already, so there is nothing to renormalise
    weight_TS = routing.score_TE.gather(1, spare_TS)
    if config.renormalize:
        taken_TK = routing.score_TE.gather(1, routing.expert_TK)
        if made_TK is not None:
            taken_TK = taken_TK.masked_fill(~made_TK, 0.0)
        weight_TS = weight_TS / (taken_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TS * config.scale


def next_experts_reference(
    logits: Sequence[float],
    scores: Sequence[float],
    biased: Sequence[float],
    chosen: Sequence[int],
    eligible: Sequence[int],
    config: RouterConfig,
    count: int,
) -> tuple[list[int], list[float]]:
    """One token's `count` spare experts and weights, with -1 and 0 where they run out. For tests."""
    left = sorted((e for e in eligible if e not in chosen), key=lambda e: (-biased[e], e))[:count]
    if config.score == "softmax" and config.weights_from == "chosen":
        weights = [math.exp(logits[e]) / sum(math.exp(logits[c]) for c in chosen) for e in left]
    else:
        weights = [
            scores[e] / (sum(scores[c] for c in chosen) if config.renormalize else 1.0)
            for e in left
        ]
    missing = count - len(left)
    return left + [-1] * missing, [weight * config.scale for weight in weights] + [0.0] * missing
