"""All routers of `dmoe/moe/routers` by their formulas, one token at a time; see there for papers.

The random numbers are drawn here from keys of its own making: only torch's generator is shared.

Letters: T tokens, D width, E experts, K experts per token, S tokens per sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from dmoe.config.plugins import parse
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.verify.naive.capacity import Choices, capacity_and_groups
from dmoe.verify.naive.plugins import own_choices
from dmoe.verify.naive.static import hash_experts, workload_experts


def route(layer: MoE, x_TD: Tensor, context: TokenContext, sequences: int) -> Choices:
    """Choose the experts of every token and compute their weights.

    Args:
        layer: its router and, for zero-cost experts, its experts.
        x_TD: router inputs.
        context: noise key, labels, token ids and padding.
        sequences: B.
    """
    valid = [True] * len(x_TD) if context.valid_T is None else [bool(v) for v in context.valid_T]
    kind = layer.router.config.kind
    if parse(kind) is not None:
        return own_choices(layer, x_TD, context, sequences, valid)
    if kind in ("fixed", "hash", "workload"):
        return _static(layer, x_TD, context, sequences, valid)
    clean_TE, std_TE, logit_TE = _logits(layer, x_TD, context, sequences)
    score_TE = torch.sigmoid(logit_TE)
    if layer.router.config.score != "sigmoid":
        score_TE = torch.exp(logit_TE) / torch.exp(logit_TE).sum(-1, keepdim=True)
    experts, next_experts = choose_experts(layer, score_TE, valid, sequences)
    weight_TE = _weights(layer, logit_TE, score_TE, experts)
    return Choices(
        experts,
        next_experts,
        logit_TE,
        score_TE,
        weight_TE,
        valid,
        clean_TE=clean_TE,
        std_TE=std_TE,
    )


def choose_experts(
    layer: MoE, score_TE: Tensor, valid: list[bool], sequences: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Choose experts from the scores of a learned router.

    Args:
        layer: gives the router's config and bias.
        score_TE: scores; their dtype is the precision of the comparisons.
        valid: [T], False for padding.
        sequences: B.

    Returns:
        Chosen experts and next experts of every token, best first.
    """
    if layer.router.config.kind == "expert_choice":
        return _expert_choice(layer, score_TE, valid, sequences), [[] for _ in valid]
    biased_TE = (score_TE + layer.router.get_buffer("bias_E")).tolist()
    exact = score_TE.dtype == torch.float64
    pairs = [
        _token_choice(layer, scores, biased, float if exact else _to_float32)
        if is_valid
        else ([], [])
        for scores, biased, is_valid in zip(score_TE.tolist(), biased_TE, valid, strict=True)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _to_float32(value: float) -> float:
    return float(np.float32(value))


def _logits(
    layer: MoE, x_TD: Tensor, context: TokenContext, sequences: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, the standard deviation of their noise, and logits with noise."""
    router, config = layer.router, layer.router.config
    if layer.training and config.jitter:
        uniform_TD = _noise(torch.rand, "jitter", x_TD, layer.layer, context, sequences)
        x_TD = x_TD * (1 - config.jitter + 2 * config.jitter * uniform_TD)
    if config.kind == "budget" and config.per == "sequence":
        x_TD = _sequence_means(x_TD, context, sequences)
    clean_TE = x_TD @ router.get_parameter("weight").t()
    if config.kind != "noisy":
        return clean_TE, torch.zeros_like(clean_TE), clean_TE
    std_TE = softplus(x_TD @ router.get_parameter("noise_weight").t())
    if not layer.training:
        return clean_TE, std_TE, clean_TE
    normal_TE = _noise(torch.randn, "noise", clean_TE, layer.layer, context, sequences)
    return clean_TE, std_TE, clean_TE + std_TE * normal_TE


def _noise(
    draw: Callable[..., Tensor],
    purpose: str,
    like_TX: Tensor,
    layer: int,
    context: TokenContext,
    sequences: int,
) -> Tensor:
    """Draw float32 noise for each sequence of the global batch from a generator of its own.

    The generator's seed is the first 8 bytes (little-endian, without the lowest bit) of BLAKE2b of
    the key's Python form: (seed, purpose, step, layer, index of the sequence).

    Args:
        draw: `torch.rand` or `torch.randn`.
        purpose: name of the noise.
        like_TX: gives shape and dtype.
        layer: index among the MoE layers.
        context: seed and step, and the index of the first sequence.
        sequences: B.
    """
    assert context.noise_key is not None
    seed, step = context.noise_key
    rows = []
    for b in range(sequences):
        key = f"({seed}, {purpose!r}, {step}, {layer}, {context.first_sequence + b})"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        rows.append(draw((len(like_TX) // sequences, like_TX.shape[1]), generator=source))
    return torch.cat(rows).to(like_TX.dtype)


def _sequence_means(x_TD: Tensor, context: TokenContext, sequences: int) -> Tensor:
    """Replace every token by the mean over the tokens of its sequence that are not padding."""
    rows, size = list[Tensor](), len(x_TD) // sequences
    for t in range(len(x_TD)):
        own = range(t // size * size, (t // size + 1) * size)
        valid = [u for u in own if context.valid_T is None or bool(context.valid_T[u])]
        rows.append(
            torch.stack([x_TD[u] for u in valid]).mean(0) if valid else torch.zeros_like(x_TD[t])
        )
    return torch.stack(rows)


def _token_choice(
    layer: MoE, scores: list[float], biased: list[float], rounded: Callable[[float], float]
) -> tuple[list[int], list[int]]:
    """Choose the experts of one token.

    Args:
        layer: gives the router's config.
        scores: [E].
        biased: [E], score + load-balancing bias.
        rounded: rounds a sum to the precision of the scores.

    Returns:
        Chosen experts and next experts, best first.
    """
    config, count = layer.router.config, layer.num_experts
    order = sorted(range(count), key=lambda e: (-biased[e], e))
    if config.kind == "soft":
        return list(range(count)), []
    if config.kind == "group_limited":
        size = count // config.groups
        strength = [
            rounded(sum(sorted(biased[g * size : (g + 1) * size])[-2:]))
            for g in range(config.groups)
        ]
        best = sorted(range(config.groups), key=lambda g: (-strength[g], g))[: config.topk_groups]
        order = [e for e in order if e // size in best]
    k = layer.top_k
    if config.kind == "budget":
        return _within_budget(layer, scores, order[:k], rounded), []
    if config.kind == "adaptive":
        enough = rounded(config.top_p)
        k = next(
            (
                n
                for n in range(config.k_min, k)
                if rounded(sum(scores[e] for e in order[:n])) >= enough
            ),
            k,
        )
    return order[:k], order[k:]


def _within_budget(
    layer: MoE, scores: list[float], order: list[int], rounded: Callable[[float], float]
) -> list[int]:
    """Take experts by descending score while their cost fits the budget.

    The budget is a decimal fraction, so it has a relative tolerance of 1e-9.
    """
    cost, used, chosen = expert_costs(layer), 0, list[int]()
    budget = layer.router.config.budget * sum(cost) * (1 + 1e-9)
    for e in order:
        if scores[e] > rounded(layer.router.config.min_weight) and used + cost[e] <= budget:
            chosen.append(e)
            used += cost[e]
    return chosen


def expert_costs(layer: MoE) -> list[int]:
    """Return the multiply-adds per row of every expert of all ranks; 0 for zero-cost experts."""
    cost = [sum(rows * columns for rows, columns in sizes) for sizes in layer.experts.matrices]
    return cost + [0] * (layer.num_experts - len(cost))


def _expert_choice(
    layer: MoE, score_TE: Tensor, valid: list[bool], sequences: int
) -> list[list[int]]:
    """Let each expert take the tokens of largest score in each group."""
    capacity, groups = capacity_and_groups(layer, len(valid), sequences, default_factor=1.0)
    experts: list[list[int]] = [[] for _ in valid]
    size, scores = len(valid) // groups, score_TE.to(torch.float32).tolist()
    for e in range(layer.num_experts):
        for g in range(groups):
            tokens = [t for t in range(g * size, (g + 1) * size) if valid[t]]
            for t in sorted(tokens, key=lambda t: (-scores[t][e], t))[:capacity]:
                experts[t].append(e)
    return experts


def _static(
    layer: MoE, x_TD: Tensor, context: TokenContext, sequences: int, valid: list[bool]
) -> Choices:
    """Choose experts by token id, label or workload, with equal weights and no gradient.

    Args:
        layer: its router.
        x_TD: router inputs.
        context: labels, token ids, noise key and padding.
        sequences: B.
        valid: [T], False for padding.
    """
    count, k = layer.num_experts, layer.top_k
    if layer.router.config.kind == "hash":
        assert context.token_id_T is not None
        experts = [hash_experts(int(token), k, count, layer.layer) for token in context.token_id_T]
    elif layer.router.config.kind == "workload":
        length = max(1, len(valid) // max(1, sequences))
        first, (seed, step) = context.first_sequence * length, context.noise_key or (0, 0)
        experts = [
            workload_experts(
                layer.router.config,
                count,
                k,
                layer.layer,
                token=first + t,
                length=length,
                seed=seed,
                step=step,
            )
            for t in range(len(valid))
        ]
    else:
        assert context.label_T is not None
        experts = [[(int(label) * k + i) % count for i in range(k)] for label in context.label_T]
    experts = [own if is_valid else [] for own, is_valid in zip(experts, valid, strict=True)]
    score_TE = torch.zeros(len(valid), count, dtype=x_TD.dtype)
    for t, own in enumerate(experts):
        score_TE[t, own or slice(None)] = 1.0 / (k if own else count)
    logit_TE = torch.full_like(score_TE, -math.log(count))
    none: list[list[int]] = [[] for _ in valid]
    weight_TE = score_TE * layer.router.config.scale
    return Choices(experts, none, logit_TE, score_TE, weight_TE, valid)


def _weights(layer: MoE, logit_TE: Tensor, score_TE: Tensor, experts: list[list[int]]) -> Tensor:
    """Return the combine weight of every expert: its score, times the scale.

    If the config says so, the score is divided by the sum over the chosen experts.
    """
    config = layer.router.config
    chosen_TE = torch.zeros_like(score_TE)
    for t, own in enumerate(experts):
        chosen_TE[t, own] = 1.0
    weight_TE = score_TE
    if (
        config.weights_from == "chosen"
        and config.score == "softmax"
        and config.kind not in ("soft", "expert_choice")
    ):
        weight_TE = torch.exp(logit_TE)
        weight_TE = weight_TE / ((weight_TE * chosen_TE).sum(-1, keepdim=True) + 1e-300)
    if config.renormalize and config.kind not in ("soft", "expert_choice"):
        weight_TE = weight_TE / ((weight_TE * chosen_TE).sum(-1, keepdim=True) + 1e-20)
    return weight_TE * config.scale
