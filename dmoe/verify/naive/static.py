"""Routers without parameters by their definitions, one token at a time; see there for papers.

Letters: T tokens, D width, E experts, K experts per token, S tokens per sequence.
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import torch

from dmoe.config.schema import RouterConfig


def hash_experts(token: int, top_k: int, num_experts: int, layer: int) -> list[int]:
    """Draw one token's experts from a shrinking list (`dmoe/moe/routers/static.py`).

    Args:
        token: token id.
        top_k: K.
        num_experts: E.
        layer: index among the MoE layers.
    """

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D % 2**32
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        return word ^ (word >> 16)

    remaining = list(range(num_experts))
    return [
        remaining.pop(mix((mix(token) + k + 64 * layer) % 2**32) % len(remaining))
        for k in range(top_k)
    ]


def workload_experts(
    config: RouterConfig,
    num_experts: int,
    top_k: int,
    layer: int,
    *,
    token: int,
    length: int,
    seed: int,
    step: int,
) -> list[int]:
    """Return the experts of one token, [] if it chooses none.

    Args:
        config: workload, ranks, hot.
        num_experts: E.
        top_k: K.
        layer: index among the MoE layers.
        token: index in the global batch.
        length: S, tokens per sequence.
        seed: of the run.
        step: optimizer step.
    """
    kind, ranks = config.workload, config.ranks
    if kind == "W7":
        kind = "W2" if step % 5 == 3 else "W0"
    if kind == "W4":
        choosing = [(b % ranks + 1) * length // ranks for b in range(token // length + 1)]
        if token % length >= choosing[-1]:
            return []
        token, kind = sum(choosing[:-1]) + token % length, "W0"
    assignments = [
        token * top_k + k + _hash(seed, "workload", layer, step) % 2**20 for k in range(top_k)
    ]
    if kind == "W0":
        return [a % num_experts for a in assignments]
    start = _hash(seed, "hot", layer) + (step // 3 if kind == "W6" else 0)
    order = _order(kind, num_experts, ranks, start)
    if kind == "W1":
        drawn = torch.Generator().manual_seed(_hash(seed, "hot set", layer))
        order = torch.randperm(num_experts, generator=drawn).tolist()
    hot, cold = order[: num_experts // ranks], order[num_experts // ranks :]
    if kind == "W5":
        return [cold[a % len(cold)] for a in assignments]
    share, experts = Fraction(config.hot).limit_denominator(1000) / ranks, []
    for a in assignments:
        hot_before = math.floor(a * share)
        if math.floor((a + 1) * share) > hot_before:
            experts.append(hot[hot_before % len(hot)])
        else:
            experts.append(cold[(a - hot_before) % len(cold)])
    return experts


def _order(kind: str, num_experts: int, ranks: int, start: int) -> list[int]:
    """List all experts, those of the hot set first."""
    size = num_experts // ranks
    if kind == "W3":
        columns = [range(first, num_experts, ranks) for first in range(ranks)]
        return [(start + e) % num_experts for column in columns for e in column]
    return [(start % ranks * size + i) % num_experts for i in range(num_experts)]


def _hash(*key: int | str) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2
