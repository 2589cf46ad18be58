"""Auxiliary losses and the bias update by loops, from the formulas."""

from __future__ import annotations

import math

from torch import Tensor

from dmoe.moe.routing import Noise, Routing


def switch_reference(routing: Routing, tokens: list[int], prior: list[int] | None = None) -> float:
    """Compute the Switch loss of one unit, given its real tokens."""
    num_experts = routing.score_TE.shape[1]
    counts = [0] * num_experts if prior is None else list(prior)
    for t in tokens:
        for k, expert in enumerate(routing.expert_TK[t].tolist()):
            counts[expert] += bool(routing.is_selected_TK[t, k])
    loss = 0.0
    for expert in range(num_experts):
        shares = [float(routing.score_TE[t, expert] / routing.score_TE[t].sum()) for t in tokens]
        loss += counts[expert] / max(1, sum(counts)) * sum(shares) / max(1, len(tokens))
    return num_experts * loss


def z_reference(logit_TE: Tensor, tokens: list[int]) -> float:
    """Compute the loss of one unit, given its real tokens."""
    return sum(
        math.log(sum(math.exp(logit) for logit in logit_TE[t].tolist())) ** 2 for t in tokens
    ) / max(1, len(tokens))


def importance_reference(score_TE: Tensor, tokens: list[int]) -> float:
    """Compute the importance loss of one unit, given its real tokens."""
    return squared_variation_reference(
        [sum(float(score_TE[t, e]) for t in tokens) for e in range(score_TE.shape[1])]
    )


def squared_variation_reference(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2 if mean else 0.0


def usage_std_reference(score_TE: Tensor, tokens: list[int]) -> float:
    """Compute the usage_std loss of one unit, given its real tokens."""
    experts = range(score_TE.shape[1])
    usage = [
        sum(float(score_TE[t, e] / score_TE[t].sum()) for t in tokens) / max(1, len(tokens))
        for e in experts
    ]
    mean = sum(usage) / len(usage)
    return math.sqrt(sum((value - mean) ** 2 for value in usage) / len(usage))


def load_reference(logit_TE: Tensor, noise: Noise, top_k: int, tokens: list[int]) -> float:
    """Compute the loss of one unit, given its real tokens."""
    num_experts = logit_TE.shape[1]
    load = [0.0] * num_experts
    for t in tokens:
        noisy, clean, std = (
            logit_TE[t].tolist(),
            noise.clean_TE[t].tolist(),
            noise.std_TE[t].tolist(),
        )
        for expert in range(num_experts):
            others = sorted((noisy[e] for e in range(num_experts) if e != expert), reverse=True)
            certain = top_k > len(others)
            away = math.inf if certain else (clean[expert] - others[top_k - 1]) / std[expert]
            load[expert] += 0.5 * (1.0 + math.erf(away / math.sqrt(2.0)))
    return squared_variation_reference(load)


def bias_reference(
    bias: list[float], counts: list[int], rate: float, recenter: bool
) -> list[float]:
    """Compute `updated_bias` of one layer."""
    moved = []
    for value, chosen in zip(bias, counts, strict=True):
        if chosen * len(counts) < sum(counts):
            value += rate
        elif chosen * len(counts) > sum(counts):
            value -= rate
        moved.append(value)
    mean = sum(moved) / len(moved)
    return [value - mean for value in moved] if recenter else moved
