"""The whole layer as loops over tokens, from the formulas: no code shared with `dmoe.moe`.

Everything is plain tensor arithmetic, so autograd through it gives the gradients that the layer
must have.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe import MoE


@dataclass
class NaiveOutput:
    y: Tensor
    switch: Tensor
    z: Tensor
    kept: set[tuple[int, int]]
    """(token, expert) pairs that were computed."""
    chosen: list[list[int]]


def naive_moe(
    layer: MoE, x_TD: Tensor, *, groups: int = 1, valid: list[bool] | None = None
) -> NaiveOutput:
    valid = [True] * len(x_TD) if valid is None else valid
    real = [t for t in range(len(x_TD)) if valid[t]]
    # the layer reads padding as zeros and returns zeros for it, whatever it holds
    x_TD = torch.stack([x if valid[t] else torch.zeros_like(x) for t, x in enumerate(x_TD)])
    logits = [layer.router.weight @ x for x in x_TD]
    scores = [
        torch.softmax(row, -1) if layer.router.config.score == "softmax" else torch.sigmoid(row)
        for row in logits
    ]
    chosen = [best(row.tolist(), layer.router.top_k) for row in scores]
    weights = [weights_of_token(layer, logits[t], scores[t], chosen[t]) for t in range(len(x_TD))]
    kept = survivors(layer, scores, chosen, groups, valid)

    rows = []
    for t, x in enumerate(x_TD):
        alive = [k for k in range(len(chosen[t])) if (t, chosen[t][k]) in kept]
        total = (
            sum((weights[t][k] for k in alive), torch.zeros_like(x[0]))
            if layer.capacity.renormalize
            else layer.router.config.scale
        )
        y = torch.zeros(layer.experts.w_out.shape[2], dtype=x.dtype)
        for k in alive:
            weight = weights[t][k] / total * layer.router.config.scale
            y = y + weight * feed_forward(
                layer.experts.kind,
                x,
                layer.experts.w_in[chosen[t][k]],
                layer.experts.w_out[chosen[t][k]],
            )
        if layer.shared is not None and valid[t]:
            y = y + feed_forward(
                layer.shared.kind, x, layer.shared.w_in.weight.t(), layer.shared.w_out.weight.t()
            )
        rows.append(y)
    return NaiveOutput(
        torch.stack(rows), switch_loss(scores, chosen, real), z_loss(logits, real), kept, chosen
    )


def best(scores: list[float], top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:top_k]


def weights_of_token(layer: MoE, logits: Tensor, scores: Tensor, chosen: list[int]) -> list[Tensor]:
    config = layer.router.config
    weights = [scores[e] for e in chosen]
    if config.weights_from == "chosen" and config.score == "softmax":
        weights = list(torch.softmax(torch.stack([logits[e] for e in chosen]), -1))
    if config.renormalize:
        total = sum(weights, torch.zeros_like(weights[0]))
        weights = [weight / total for weight in weights]
    return [weight * config.scale for weight in weights]


def survivors(
    layer: MoE, scores: list[Tensor], chosen: list[list[int]], groups: int, valid: list[bool]
) -> set[tuple[int, int]]:
    tokens, top_k, experts = len(chosen), layer.router.top_k, layer.experts.num_experts
    factor = layer.capacity.factor if layer.training else layer.capacity.eval_factor
    waiting = [(k, t) for k in range(top_k) for t in range(tokens) if valid[t]]
    if factor is None:
        return {(t, chosen[t][k]) for k, t in waiting}
    per_group = tokens // groups
    capacity = min(
        per_group,
        max(layer.capacity.min_capacity, math.ceil(factor * top_k * per_group / experts - 1e-9)),
    )
    if layer.capacity.priority == "score":
        waiting.sort(key=lambda kt: (-float(scores[kt[1]][chosen[kt[1]][kt[0]]]), kt))
    kept: set[tuple[int, int]] = set()
    served: dict[tuple[int, int], int] = {}
    for k, t in waiting:
        queue = (t // per_group, chosen[t][k])
        served[queue] = served.get(queue, 0) + 1
        if served[queue] <= capacity:
            kept.add((t, chosen[t][k]))
    return kept


def feed_forward(kind: str, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    hidden = x @ w_in
    if kind in ("swiglu", "geglu"):
        gate, up = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        bent = (
            gate * torch.sigmoid(gate)
            if kind == "swiglu"
            else gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        )
        return bent * up @ w_out
    return (
        hidden.clamp(min=0)
        if kind == "relu"
        else hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    ) @ w_out


def switch_loss(scores: list[Tensor], chosen: list[list[int]], real: list[int]) -> Tensor:
    experts, choices = len(scores[0]), sum(len(chosen[t]) for t in real)
    loss = scores[0].new_zeros(())
    for e in range(experts):
        f = sum(chosen[t].count(e) for t in real) / max(1, choices)
        p = sum((scores[t][e] / scores[t].sum() for t in real), scores[0].new_zeros(())) / max(
            1, len(real)
        )
        loss = loss + f * p
    return experts * loss


def z_loss(logits: list[Tensor], real: list[int]) -> Tensor:
    return sum((logits[t].exp().sum().log() ** 2 for t in real), logits[0].new_zeros(())) / max(
        1, len(real)
    )
