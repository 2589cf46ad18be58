"""The experts a token would take next, for `capacity.overflow: next_choice`.

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

from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.routing import Routing

__all__ = ["next_experts_reference", "with_next_experts"]


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
        spare_TS, weight_TS = spare_TS.masked_fill(~there_TS, -1), weight_TS.masked_fill(~there_TS, 0.0)
    return replace(routing, next_expert_TS=spare_TS, next_weight_TS=weight_TS)


def next_weights(routing: Routing, spare_TS: Tensor, config: RouterConfig, made_TK: Tensor | None) -> Tensor:
    if config.score == "softmax" and config.weights_from == "chosen":
        chosen_TK = routing.logit_TE.gather(1, routing.expert_TK)
        if made_TK is not None:
            chosen_TK = chosen_TK.masked_fill(~made_TK, -math.inf)
        weight_TS = (routing.logit_TE.gather(1, spare_TS) - chosen_TK.logsumexp(-1, keepdim=True)).exp()
        return weight_TS * config.scale  # the chosen ones sum to 1 already, so there is nothing to renormalise
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
        weights = [scores[e] / (sum(scores[c] for c in chosen) if config.renormalize else 1.0) for e in left]
    missing = count - len(left)
    return left + [-1] * missing, [weight * config.scale for weight in weights] + [0.0] * missing
