"""Which rank holds which experts."""

from __future__ import annotations

from dmoe.config.rules import moe_blocks
from dmoe.explain.section import Section, count, ranges
from dmoe.explain.setting import Setting

MOST_LINES = 8


def describe(setting: Setting) -> Section:
    config, blocks = setting.config, moe_blocks(setting.config)
    layers = len(setting.model.moe_layers())
    numbers = {
        "ep": setting.ep,
        "edp": setting.edp,
        "moe_blocks": blocks,
        "blocks": config.model.layers,
        "owners": [],
    }
    if not layers:
        return Section(
            "experts", "Experts and ranks", ["The model is dense: no block has experts."], numbers
        )
    assert setting.layer is not None
    experts, cost = config.moe.num_experts, setting.layer.experts.cost
    owners = [
        (list(range(first, setting.world, setting.ep)), setting.owned(first))
        for first in range(setting.ep)
    ]
    numbers |= {
        "num_experts": experts,
        "experts_per_rank": max(len(owned) for _, owned in owners),
        "owners": [
            {"ranks": ranks, "experts": list(owned), "expected_work": sum(cost[e] for e in owned)}
            for ranks, owned in owners
        ],
        "cost": list(setting.layer.cost_E),
    }
    largest = "divides both the ranks and the experts"
    largest = (
        "divides the ranks and leaves none without an expert"
        if config.moe.experts.shapes
        else largest
    )
    chosen = f"the largest number that {largest}" if config.parallel.ep == "auto" else "as set"
    shared = (
        f"{experts // setting.ep} on a rank"
        if not config.moe.experts.shapes
        else "shared by their cost"
    )
    words = [
        f"{_which(blocks, config.model.layers, layers)}: {count(experts, 'expert')} each, "
        f"{shared}: EP = {setting.ep} ({chosen}), {_copies(setting.edp)}.",
        *_lines([_owner(setting, ranks, owned) for ranks, owned in owners]),
        *_costs(setting),
    ]
    return Section("experts", "Experts and ranks", words, numbers)


def _owner(setting: Setting, ranks: list[int], owned: tuple[int, ...]) -> str:
    line = f"rank {ranges(ranks)}: experts {ranges(owned)}"
    if not setting.config.moe.experts.shapes:
        return line
    assert setting.layer is not None
    cost = setting.layer.experts.cost
    return f"{line}, {sum(cost[e] for e in owned):.1%} of the work if all are chosen equally often"


def _costs(setting: Setting) -> list[str]:
    """What a row costs with each expert, where they differ."""
    moe, layer = setting.config.moe, setting.layer
    assert layer is not None
    said = []
    if moe.experts.shapes:
        each = [
            f"{e} ({' x '.join(map(str, shape)) or 'linear'}) {cost:.1%}"
            for e, (shape, cost) in enumerate(
                zip(moe.experts.shapes, layer.experts.cost, strict=True)
            )
        ]
        said = [
            "Cost of a row, as a share of the multiply-adds of all experts together: expert "
            f"{', '.join(_few(each))}. Heaviest first, each goes to the rank with the least work so far."
        ]
    if layer.num_zero_cost:
        ids, names = range(moe.num_experts, layer.num_experts), layer.names_E[moe.num_experts :]
        each = [f"{e} {name}" for e, name in zip(ids, names, strict=True)]
        said.append(
            f"Experts that cost nothing, on every rank, without capacity and never sent: {', '.join(_few(each))}."
        )
    return said


def _few(each: list[str]) -> list[str]:
    return each if len(each) <= MOST_LINES else [*each[:3], "...", each[-1]]


def _which(blocks: list[int], layers: int, mixtures: int) -> str:
    if mixtures != len(blocks):  # a classifier has some outside its blocks
        return f"{count(mixtures, 'layer')} of experts"
    if len(blocks) == layers:
        return (
            f"All {count(layers, 'block')} are mixtures of experts"
            if layers > 1
            else "The one block is a mixture of experts"
        )
    return f"{len(blocks)} of {layers} blocks are mixtures of experts (number {ranges(blocks)}, counted from 0)"


def _copies(edp: int) -> str:
    return (
        "each expert exists once"
        if edp == 1
        else f"{edp} copies of each expert (EDP), kept equal by summing their gradients"
    )


def _lines(lines: list[str]) -> list[str]:
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[:3], f"... {len(lines) - 4} more, in the same way", lines[-1]]
