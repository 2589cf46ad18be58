"""Replay of recorded choices: the experts of each token are given, their weights are not.

    expert_TK = given;   weight_TK = combine_weights(logit, score, given)        (base.py)

So gradients flow to the router through the weights, as if it had chosen these experts itself; with
the weights of the run that was recorded, everything is equal to the last bit. This is what training
on the rollouts of an inference engine needs, whose router rounds otherwise: the same experts, but
the trainer's own probabilities ("Rollout Routing Replay", Ma et al. 2025).

Auxiliary losses and the balance bias count the given choices. Cost: a gather of [T, K]; the router
still sorts. No host sync.

Letters: T tokens, N sampled tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import RouterConfig
from dmoe.moe.expert_queue import priority_score
from dmoe.moe.routers.base import top_k_stable, weights_and_logits
from dmoe.moe.routing import DispatchPlan, Routing, TokenContext

SAMPLED_TOKENS = 256


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
    rule = (routing.logit_TE, routing.score_TE, expert_TK, config, selected_TK)
    weight_TK, loss_logit_TE = weights_and_logits(*rule)
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
    ).with_loss_logits(None if valid_T is not None else loss_logit_TE)


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


def choices_with_all_scores(
    routing: Routing, plan: DispatchPlan, context: TokenContext
) -> dict[str, Tensor]:
    """Return `choice_TK`, and `score_TE`, float32: what the selection adds the bias to.

    Scores are not negative; those of padding are -1. A `MetricsFn`.
    """
    score_TE = priority_score(routing.score_TE)
    if context.valid_T is not None:
        score_TE = score_TE.masked_fill(~context.valid_T.unsqueeze(1), -1.0)
    return choices(routing, plan, context) | {"score_TE": score_TE}


def sampled_scores(
    routing: Routing, plan: DispatchPlan, context: TokenContext
) -> dict[str, Tensor]:
    """Return `choices_with_all_scores` of the first 256 tokens of a forward; a `MetricsFn`.

    Returns:
        `sampled_choice_TK` and `sampled_score_TE`, at most 256 rows: 1 KiB per expert and layer.
    """
    found = choices_with_all_scores(routing, plan, context)
    return {f"sampled_{name}": value[:SAMPLED_TOKENS].clone() for name, value in found.items()}


def count_own(choice_NK: Tensor, score_NE: Tensor, bias_E: Tensor) -> Tensor:
    """Count the given experts, and those among them that the router would have chosen itself.

    Its own choice: the K largest of score + bias, of all groups of experts, without noise.

    Args:
        choice_NK: int32; -1 for none.
        score_NE: of the router.
        bias_E: of its choice.

    Returns:
        int64 [2]: would have been chosen, given.
    """
    own_NK = top_k_stable(score_NE + bias_E, choice_NK.shape[1])
    same_NK = (choice_NK.unsqueeze(2) == own_NK.unsqueeze(1)).any(2)
    is_given_NK = choice_NK >= 0
    return torch.stack([(same_NK & is_given_NK).sum(), is_given_NK.sum()])
