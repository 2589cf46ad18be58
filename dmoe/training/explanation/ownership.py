"""Which rank holds which experts."""

from __future__ import annotations

from dmoe.config.check import moe_blocks
from dmoe.training.explanation.section import Section, count, ranges
from dmoe.training.explanation.setting import Setting

__all__ = ["describe"]

MOST_LINES = 8


def describe(setting: Setting) -> Section:
    config, blocks = setting.config, moe_blocks(setting.config)
    numbers = {"ep": setting.ep, "edp": setting.edp, "moe_blocks": blocks, "blocks": config.model.layers, "owners": []}
    if not blocks:
        return Section("experts", "Experts and ranks", ["The model is dense: no block has experts."], numbers)
    experts = config.moe.num_experts
    owners = [(list(range(first, setting.world, setting.ep)), setting.owned(first)) for first in range(setting.ep)]
    numbers |= {
        "num_experts": experts,
        "experts_per_rank": experts // setting.ep,
        "owners": [{"ranks": ranks, "experts": list(owned)} for ranks, owned in owners],
    }
    chosen = "the largest number that divides both the ranks and the experts" if config.parallel.ep == "auto" else "as set"
    words = [
        f"{_which(blocks, config.model.layers)}: {count(experts, 'expert')} each, "
        f"{experts // setting.ep} on a rank: EP = {setting.ep} ({chosen}), {_copies(setting.edp)}.",
        *_lines([f"rank {ranges(ranks)}: experts {ranges(owned)}" for ranks, owned in owners]),
    ]
    return Section("experts", "Experts and ranks", words, numbers)


def _which(blocks: list[int], layers: int) -> str:
    if len(blocks) == layers:
        return (
            f"All {count(layers, 'block')} are mixtures of experts" if layers > 1 else "The one block is a mixture of experts"
        )
    return f"{len(blocks)} of {layers} blocks are mixtures of experts (number {ranges(blocks)}, counted from 0)"


def _copies(edp: int) -> str:
    return (
        "each expert exists once" if edp == 1 else f"{edp} copies of each expert (EDP), kept equal by summing their gradients"
    )


def _lines(lines: list[str]) -> list[str]:
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[:3], f"... {len(lines) - 4} more, in the same way", lines[-1]]
