"""Drops of given choices at any capacity: by the code of the layer, without the network.

The assignments that a capacity keeps depend on choices, scores (`priority: score`) and groups
alone. So `apply_capacity` on the recorded choices of W ranks gives what the run would have kept,
exactly; one process with W groups holds all ranks (`parallel.virtual_ranks`).

Letters: N tokens of a step, L MoE layers, E experts, K experts per token, T tokens of a micro-batch
of all ranks, W ranks, n samples per rank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.interfaces import NoComm
from dmoe.moe.routing import BatchShape, Routing
from dmoe.replay.part import NONE, ChoiceSpec

TOKENS = 1 << 16
"""Tokens that capacity is applied to at a time, unless one group has more."""


def check_capacity(capacity: CapacityConfig, has_scores: bool, has_next: bool = False) -> None:
    """Refuse a capacity that recorded choices cannot answer. Raises ConfigError."""
    if capacity.factor is None:
        return
    if capacity.overflow == "next_choice" and not has_next:
        allowed = "offers a token's next expert, and recorded choices have none"
        fix = "record the run with tracking.trace=scores, or use drop"
        raise ConfigError("moe.capacity.overflow", "next_choice", allowed, fix)
    if capacity.priority == "score" and not has_scores:
        allowed = "needs the scores of the choices, which this trace has not"
        raise ConfigError("moe.capacity.priority", "score", allowed, "use position")


def kept_experts(
    expert_NLK: np.ndarray,
    score_NLK: np.ndarray | None,
    capacity: CapacityConfig,
    spec: ChoiceSpec,
    *,
    ranks: int,
    micro_batch: int,
    zero_cost: int = 0,
    next_NLS: np.ndarray | None = None,
) -> np.ndarray:
    """Return the expert that computes each assignment of one step, int64 [N, L, K], -1 for none.

    Args:
        expert_NLK: ids, -1 for none.
        score_NLK: of the choices, or with `next_NLS` of all experts [N, L, E]; read by `priority:
            score`.
        capacity: section `moe.capacity`.
        spec: sizes.
        ranks: W.
        micro_batch: n.
        zero_cost: zero-cost experts (highest ids): no queue, always kept.
        next_NLS: next experts, -1 for none; read by `overflow: next_choice`.
    """
    if capacity.factor is None:
        return expert_NLK
    tokens = ranks * micro_batch * spec.seq_len
    groups = {"rank": ranks, "sequence": ranks * micro_batch, "global": 1}[capacity.group]
    slots = expert_capacity(
        capacity.factor, tokens // groups, spec.top_k, spec.experts, capacity.min_capacity
    )
    at_once = max(1, min(groups, TOKENS * groups // tokens))  # groups; they do not know each other
    while groups % at_once:
        at_once -= 1
    size = tokens // groups * at_once
    shape = BatchShape(at_once, at_once, slots)
    result = np.full_like(expert_NLK, NONE)
    for start in range(0, len(expert_NLK), size):
        for layer in range(spec.layers):
            part = slice(start, start + size), layer
            scores = None if score_NLK is None else score_NLK[part]
            following = None if next_NLS is None else next_NLS[part]
            routing = as_routing(expert_NLK[part], scores, spec.experts, following)
            plan = apply_capacity(routing, shape, capacity, NoComm(), zero_cost)
            result[part] = plan.expert_TK.where(plan.is_kept_TK, NONE).numpy()
    return result


def as_routing(
    expert_TK: np.ndarray,
    score_TK: np.ndarray | None,
    experts: int,
    next_TS: np.ndarray | None = None,
) -> Routing:
    """Return recorded choices as a router's decision: equal weights, scores where chosen.

    With `next_TS`, the scores are those of all experts, [T, E].
    """
    id_TK = torch.from_numpy(expert_TK.copy()).long()
    selected_TK = id_TK >= 0
    id_TK = id_TK.clamp(min=0)
    score_TE: Tensor = torch.zeros(len(id_TK), experts)
    if next_TS is not None:
        score_TE = score_TE if score_TK is None else torch.from_numpy(score_TK.copy())
    elif score_TK is not None:
        given_TK = torch.from_numpy(score_TK.copy()).float().masked_fill(~selected_TK, 0.0)
        score_TE = score_TE.scatter_add(1, id_TK, given_TK)
    weight_TK = torch.ones(id_TK.shape)
    following = None if next_TS is None else torch.from_numpy(next_TS.copy()).long()
    return Routing(
        id_TK,
        weight_TK,
        score_TE,
        score_TE,
        selected_TK=selected_TK,
        next_expert_TS=following,
        next_weight_TS=None if following is None else torch.ones(following.shape),
    )
