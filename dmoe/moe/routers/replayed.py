"""Replay of recorded choices: the experts of each token are given, their weights are not.

    expert_TK = given;   weight_TK = combine_weights(logit, score, given)        (base.py)

So gradients flow to the router through the weights, as if it had chosen these experts itself; with
the weights of the run that was recorded, everything is equal to the last bit. This is what training
on the rollouts of an inference engine needs, whose router rounds otherwise: the same experts, but
the trainer's own probabilities ("Rollout Routing Replay", Ma et al. 2025).

Auxiliary losses and the balance bias count the given choices. Cost: a gather of [T, K]; the router
still sorts. No host sync.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import RouterConfig
from dmoe.moe.expert_queue import priority_score
from dmoe.moe.routers.base import combine_weights
from dmoe.moe.routing import DispatchPlan, Routing, TokenContext


def with_given_experts(
    routing: Routing, context: TokenContext, layer: int, config: RouterConfig
) -> Routing:
    """Return the routing with the context's experts.

    Args:
        routing: the router's own decision.
        context: `given_expert_LTK`.
        layer: index among the MoE layers.
        config: of the router, as it uses it.
    """
    assert context.given_expert_LTK is not None
    given_TK = context.given_expert_LTK[layer]
    selected_TK: Tensor | None = given_TK >= 0
    if not router_spec(config.kind).variable_k:
        selected_TK = None
    expert_TK = given_TK.clamp(min=0)
    weight_TK = combine_weights(routing.logit_TE, routing.score_TE, expert_TK, config, selected_TK)
    valid_T = context.valid_T
    if valid_T is not None:
        real_TK = valid_T.unsqueeze(1).expand_as(expert_TK)
        selected_TK = real_TK if selected_TK is None else real_TK & selected_TK
    return replace(
        routing,
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        selected_TK=selected_TK,
        next_expert_TS=None,
        next_weight_TS=None,
    )


def choices(routing: Routing, plan: DispatchPlan, context: TokenContext) -> dict[str, Tensor]:
    """Return each token's experts before any drop, -1 where none is selected; a `MetricsFn`.

    Returns:
        `choice_TK`, int32.
    """
    expert_TK = routing.expert_TK
    if routing.selected_TK is not None:
        expert_TK = expert_TK.masked_fill(~routing.selected_TK, -1)
    return {"choice_TK": expert_TK.int()}


def choices_with_scores(
    routing: Routing, plan: DispatchPlan, context: TokenContext
) -> dict[str, Tensor]:
    """Return `choice_TK`, and `score_TK`, float32: what capacity sorts by; a `MetricsFn`."""
    score_TK = priority_score(routing.score_TE.gather(1, routing.expert_TK))
    return choices(routing, plan, context) | {"score_TK": score_TK}
