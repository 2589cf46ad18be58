"""Routers one token at a time, from the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.config.schema import RouterConfig


def top_k_stable_reference(score_TE: Tensor, top_k: int) -> Tensor:
    """Compute `top_k_stable` one token at a time."""
    rows = []
    for row in score_TE.tolist():
        rows.append(sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k])
    return torch.tensor(rows, dtype=torch.int64).view(-1, top_k)


def top_k_reference(
    logits: Sequence[float], bias: Sequence[float], config: RouterConfig, top_k: int
) -> tuple[list[int], list[float]]:
    """Return one token's experts and weights."""
    exponentials = [math.exp(logit) for logit in logits]
    softmax = [value / sum(exponentials) for value in exponentials]
    scores = (
        softmax if config.score == "softmax" else [1 / (1 + math.exp(-logit)) for logit in logits]
    )
    chosen = sorted(range(len(scores)), key=lambda e: (-(scores[e] + bias[e]), e))[:top_k]
    weights = [scores[e] for e in chosen]
    if config.weights_from == "chosen" and config.score == "softmax":
        weights = [exponentials[e] / sum(exponentials[c] for c in chosen) for e in chosen]
    total = sum(weights) if config.renormalize else 1.0
    return chosen, [weight / total * config.scale for weight in weights]


def next_experts_reference(
    logits: Sequence[float],
    scores: Sequence[float],
    biased: Sequence[float],
    chosen: Sequence[int],
    eligible: Sequence[int],
    config: RouterConfig,
    count: int,
) -> tuple[list[int], list[float]]:
    """Return one token's `count` next experts and weights, -1 and 0 where there are no more."""
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


def eligible_reference(biased: Sequence[float], groups: int, topk_groups: int) -> list[int]:
    """Return one token's eligible experts, group by group."""
    size = len(biased) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    scores = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda g: (-scores[g], g))[:topk_groups]
    return [e for g in sorted(best) for e in members[g]]


def noisy_reference(
    x: Sequence[float],
    gate: Sequence[Sequence[float]],
    noise_gate: Sequence[Sequence[float]],
    drawn: Sequence[float],
    top_k: int,
) -> tuple[list[int], list[float]]:
    """Return one token's experts and weights; `drawn` are its E standard normals."""
    h = []
    for w_g, w_noise, normal in zip(gate, noise_gate, drawn, strict=True):
        clean = sum(a * b for a, b in zip(x, w_g, strict=True))
        std = math.log(1 + math.exp(sum(a * b for a, b in zip(x, w_noise, strict=True))))
        h.append(clean + normal * std)
    kept = sorted(range(len(h)), key=lambda e: (-h[e], e))[:top_k]
    total = sum(math.exp(h[e]) for e in kept)
    return kept, [math.exp(h[e]) / total for e in kept]


def adaptive_reference(
    probabilities: Sequence[float], bias: Sequence[float], top_p: float, k_min: int, k_max: int
) -> list[int]:
    """Return one token's experts, adding one at a time."""
    order = sorted(range(len(probabilities)), key=lambda e: (-(probabilities[e] + bias[e]), e))
    for k in range(k_min, k_max):
        if sum(probabilities[e] for e in order[:k]) >= top_p:
            return order[:k]
    return order[:k_max]


def budget_reference(
    probabilities: Sequence[float],
    bias: Sequence[float],
    work: Sequence[int],
    budget: float,
    min_weight: float,
    top_k: int,
) -> list[int]:
    """Return one token's experts, tried one after the other."""
    order = sorted(range(len(probabilities)), key=lambda e: (-(probabilities[e] + bias[e]), e))
    taken: list[int] = []
    for e in order[:top_k]:
        spent = sum(work[other] for other in taken) + work[e]
        if probabilities[e] > min_weight and spent <= budget * sum(work) * (1 + 1e-9):
            taken.append(e)
    return taken


def soft_reference(logits: Sequence[float]) -> list[float]:
    """Return one token's weight of each expert."""
    exponentials = [math.exp(logit) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def expert_choice_reference(
    scores: list[list[float]], valid: list[bool], groups: int, capacity: int
) -> list[tuple[int, int]]:
    """Return (token, expert) pairs, expert by expert and group by group."""
    per_group = len(scores) // groups
    pairs = []
    for g in range(groups):
        for e in range(len(scores[0]) if scores else 0):
            real = [t for t in range(g * per_group, (g + 1) * per_group) if valid[t]]
            pairs += [(t, e) for t in sorted(real, key=lambda t: (-scores[t][e], t))[:capacity]]
    return sorted(pairs)


def fixed_reference(label: int, top_k: int, num_experts: int) -> list[int]:
    """Return the experts of a label."""
    return [(label * top_k + k) % num_experts for k in range(top_k)]
