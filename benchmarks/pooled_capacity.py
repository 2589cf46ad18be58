"""Drops by size of pool, on the choices that a run has recorded.

    dmoe train configs/quickstart.yaml moe.num_experts=32 moe.top_k=4 moe.expert_dim=48 \\
        train.steps=400 moe.replay.record=runs/choices
    python -m benchmarks.pooled_capacity runs/choices

The run is dropless, so every pool gets the same choices: of all layers and steps, by position, in
groups of one rank's tokens. The share of the assignments without a slot is printed, over all
steps and over the last quarter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from dmoe.config.schema import CapacityConfig
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.interfaces import NoComm
from dmoe.moe.routing import BatchShape, Routing
from dmoe.replay.part import open_part, signed


def drop_rates(
    folder: Path, factor: float, pools: Sequence[int], ranks: int
) -> dict[int, list[float]]:
    """Return the share of dropped assignments of each step, by size of pool."""
    rates: dict[int, list[float]] = {pool: [] for pool in pools}
    for path in sorted(folder.glob("*.safetensors")):
        part = open_part(path)
        spec, tokens = part.spec, part.spec.global_batch * part.spec.seq_len
        for expert_NLK in torch.split(torch.from_numpy(signed(part.experts)), tokens):
            for pool in pools:
                kept = sum(
                    _count_kept(expert_TK, spec.experts, CapacityConfig(factor, pool=pool), ranks)
                    for expert_TK in expert_NLK.unbind(1)
                )
                rates[pool].append(1 - kept / expert_NLK.numel())
    return rates


def _count_kept(expert_TK: torch.Tensor, experts: int, config: CapacityConfig, ranks: int) -> int:
    """Count the assignments with a slot, of one layer and step."""
    tokens, top_k = expert_TK.shape
    assert config.factor is not None
    capacity = expert_capacity(config.factor, tokens // ranks, top_k, experts, config.min_capacity)
    score_TE = torch.ones(tokens, experts)
    routing = Routing(expert_TK, torch.ones(tokens, top_k), score_TE, score_TE)
    plan = apply_capacity(routing, BatchShape(ranks, ranks, capacity), config, NoComm())
    return int(plan.is_kept_TK.sum())


def main(arguments: list[str] | None = None) -> None:
    """Print one line per size of pool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choices", type=Path, help="folder that moe.replay.record has written")
    parser.add_argument("--factor", type=float, default=1.33)
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ranks", type=int, default=1, help="groups of tokens of a step")
    given = parser.parse_args(arguments)
    print(f"factor {given.factor:g}: share of the assignments that are dropped")
    for pool, rates in drop_rates(given.choices, given.factor, given.pools, given.ranks).items():
        late = rates[-max(1, len(rates) // 4) :]
        print(f"pool {pool:2}: {sum(rates) / len(rates):7.2%} of all {len(rates)} steps,", end=" ")
        print(f"{sum(late) / len(late):7.2%} of the last {len(late)}")


if __name__ == "__main__":
    main()
