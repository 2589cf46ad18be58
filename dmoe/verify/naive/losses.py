"""The auxiliary losses by their formulas, unit by unit. See dmoe/moe/balance for the same in a form that ranks can share."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.verify.naive.queue import Choices


def auxiliary(
    layer: MoE, decision: Choices, context: TokenContext, sequences: int
) -> dict[str, Tensor]:
    """Each loss in force, raw, by name: the mean over its units."""
    config, tokens = layer.balance, len(decision.experts_T)
    micro = _units(tokens, layer.virtual_ranks)
    losses: dict[str, Tensor] = {}
    if config.switch:
        level = {
            "sequence": _units(tokens, sequences),
            "micro_batch": micro,
            "global": _units(tokens, 1),
        }[config.switch_level]
        prior_E = (
            context.prior_count_LE[layer.layer] if context.prior_count_LE is not None else None
        )
        losses["switch"] = _mean([_switch(layer, decision, unit, prior_E) for unit in level])
    if config.z:
        losses["z"] = _mean(
            [
                _mean([torch.logsumexp(decision.logit_TE[t], 0) ** 2 for t in _real(decision, u)])
                for u in micro
            ]
        )
    if config.importance:
        losses["importance"] = _mean(
            [
                _cv_squared(sum((decision.score_TE[t] for t in _real(decision, u)), _zeros(layer)))
                for u in micro
            ]
        )
    if config.usage_std:
        losses["usage_std"] = _mean(
            [_mean_score(layer, decision, unit).std(correction=0) for unit in micro]
        )
    if config.load:
        losses["load"] = _mean([_cv_squared(_smooth_load(layer, decision, unit)) for unit in micro])
    return losses


def _smooth_load(layer: MoE, decision: Choices, unit: range) -> Tensor:
    """`sum_t Phi((clean - the K-th best noisy logit of the others) / std)` of each expert (Shazeer 2017, eq. 8 to 10)."""
    assert decision.clean_TE is not None
    assert decision.std_TE is not None
    if (
        layer.top_k == layer.num_experts
    ):  # chosen with certainty: there is no K-th of the others to beat
        return torch.full_like(decision.logit_TE[0], float(len(_real(decision, unit))))
    load = []
    for e in range(layer.num_experts):
        others = [other for other in range(layer.num_experts) if other != e]
        chances = []
        for t in _real(decision, unit):
            threshold = decision.logit_TE[t][others].sort(descending=True).values[layer.top_k - 1]
            chances.append(
                torch.special.ndtr((decision.clean_TE[t, e] - threshold) / decision.std_TE[t, e])
            )
        load.append(_sum(chances))
    return torch.stack(load)


def _switch(layer: MoE, decision: Choices, unit: range, prior_E: Tensor | None) -> Tensor:
    """`E * sum_e f_e P_e`."""
    count = [0] * layer.num_experts if prior_E is None else [int(n) for n in prior_E]
    for t in unit:
        for e in decision.experts_T[t]:
            count[e] += 1
    mean_E = _mean_score(layer, decision, unit)
    chosen = max(1, sum(count))  # with a budget, a unit's tokens may all have chosen nothing
    return layer.num_experts * _sum(
        [count[e] / chosen * mean_E[e] for e in range(layer.num_experts)]
    )


def _mean_score(layer: MoE, decision: Choices, unit: range) -> Tensor:
    return _mean([decision.score_TE[t] / decision.score_TE[t].sum() for t in _real(decision, unit)])


def _cv_squared(total_E: Tensor) -> Tensor:
    return total_E.var(correction=0) / total_E.mean() ** 2


def _units(tokens: int, count: int) -> list[range]:
    return [range(u * tokens // count, (u + 1) * tokens // count) for u in range(count)]


def _real(decision: Choices, unit: range) -> list[int]:
    return [t for t in unit if decision.valid_T[t]]


def _zeros(layer: MoE) -> Tensor:
    return torch.zeros(layer.num_experts)


def _sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)
