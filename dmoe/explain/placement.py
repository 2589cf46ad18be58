"""Placement of the experts on ranks, and modules attached to the network."""

from __future__ import annotations

from typing import Any

from dmoe.config.rules import moe_blocks
from dmoe.config.rules.modular import is_learned, modules_per_token
from dmoe.config.schema import ModularConfig
from dmoe.distributed.placement.copy_cost import passes
from dmoe.explain.setting import Section, Setting
from dmoe.moe.copy_planner import AUTO_SLOTS
from dmoe.moe.placement_plan import MIN_GAIN
from dmoe.report.format import format_bytes, format_ranges, plural
from dmoe.train.modular.attach import target_pattern

MAX_LINES = 8
TRAINED = {
    "joint": "Everything is trained.",
    "modules": "The base model is frozen; modules, routers and aggregations are trained.",
    "one_module": "One module of every bank is trained; the base model, the other modules, routers "
    "and aggregations are frozen.",
    "router": "Routers and aggregations are trained; the base model and the modules are frozen.",
}


def explain_placement(setting: Setting) -> Section:
    """Explain which blocks have experts, and which rank has which of them."""
    config, blocks = setting.config, moe_blocks(setting.config)
    numbers = {
        "ep": setting.ep,
        "edp": setting.edp,
        "moe_blocks": blocks,
        "blocks": config.model.layers,
        "owners": [],
    }
    title = "Experts and ranks"
    if setting.layer is None:
        return Section("experts", title, ["The model is dense: no block has experts."], numbers)
    cost = setting.layer.cost_E
    owners = [
        (list(range(first, setting.world, setting.ep)), setting.local_experts(first))
        for first in range(setting.ep)
    ]
    numbers |= {
        "num_experts": config.moe.num_experts,
        "experts_per_rank": max(len(experts) for _, experts in owners),
        "owners": [
            {
                "ranks": ranks,
                "experts": list(experts),
                "expected_work": sum(cost[e] for e in experts),
            }
            for ranks, experts in owners
        ],
        "cost": list(setting.layer.cost_E),
    }
    lines = [_owner(setting, ranks, experts) for ranks, experts in owners]
    if len(lines) > MAX_LINES:
        lines = [*lines[:3], f"... {len(lines) - 4} more, in the same way", lines[-1]]
    copies, copy_numbers = _copies(setting)
    moves, move_numbers = _moves(setting)
    sentences = [_sizes(setting, blocks), *_nodes(setting), *lines, *_costs(setting)]
    sentences += [*moves, *copies]
    numbers |= move_numbers | copy_numbers | {"nodes_of_ep_group": setting.nodes_of_ep_group}
    return Section("experts", title, sentences, numbers)


def _nodes(setting: Setting) -> list[str]:
    """Say whether the token exchange stays inside a machine."""
    if setting.nodes_of_ep_group is None or setting.ep == 1:
        return []
    group = f"An EP group is {setting.ep} ranks in a row"
    if setting.nodes_of_ep_group == 1:
        return [f"{group}, all on one machine: tokens never cross the network, gradients do."]
    return [
        f"{group}, on {setting.nodes_of_ep_group} machines: most tokens cross the network. An EP "
        f"that divides {setting.ranks_per_node} would keep them inside a machine."
    ]


def _sizes(setting: Setting, blocks: list[int]) -> str:
    config, moe = setting.config, setting.config.moe
    chosen = "as set"
    if config.parallel.ep == "auto":
        divided = "divides both the ranks and the experts"
        if moe.experts.shapes:
            divided = "divides the ranks and leaves none without an expert"
        chosen = f"the largest number that {divided}"
    share = f"{moe.num_experts // setting.ep} per rank"
    if moe.experts.shapes:
        share = "divided over the ranks by cost"
    copies = "each expert exists once"
    if setting.edp > 1:
        copies = f"{setting.edp} copies of each expert (EDP), kept equal by summing their gradients"
    which = _which_blocks(blocks, config.model.layers, len(setting.model.moe_layers()))
    experts = plural(moe.num_experts, "expert")
    return f"{which}: {experts} each, {share}: EP = {setting.ep} ({chosen}), {copies}."


def _which_blocks(blocks: list[int], num_blocks: int, moe_layers: int) -> str:
    # A classifier has MoE layers outside of its blocks.
    if moe_layers != len(blocks):
        return plural(moe_layers, "MoE layer")
    if len(blocks) < num_blocks:
        numbered = f"number {format_ranges(blocks)}, counted from 0"
        return f"{len(blocks)} of {num_blocks} blocks are MoE blocks ({numbered})"
    return f"All {num_blocks} blocks are MoE blocks" if num_blocks > 1 else "The only block is MoE"


def _owner(setting: Setting, ranks: list[int], experts: tuple[int, ...]) -> str:
    line = f"rank {format_ranges(ranks)}: experts {format_ranges(experts)}"
    if not setting.config.moe.experts.shapes:
        return line
    assert setting.layer is not None
    cost = setting.layer.cost_E
    work = sum(cost[e] for e in experts)
    return f"{line}, {work:.1%} of the work if all experts are chosen equally often"


def _costs(setting: Setting) -> list[str]:
    """Describe the cost of a row per expert, if experts differ."""
    moe, layer = setting.config.moe, setting.layer
    assert layer is not None
    sentences = []
    if moe.experts.shapes:
        shapes = enumerate(zip(moe.experts.shapes, layer.cost_E, strict=False))
        each = [
            f"{e} ({' x '.join(map(str, shape)) or 'linear'}) {cost:.1%}"
            for e, (shape, cost) in shapes
        ]
        sentences.append(
            "Cost of a row, as a share of the multiply-adds of all experts together: expert "
            f"{_shorten(each)}. Experts are placed by descending cost, each on the rank with the "
            "least work so far."
        )
    if layer.num_zero_cost:
        ids = range(moe.num_experts, layer.num_experts)
        names = layer.names_E[moe.num_experts :]
        each = [f"{e} {name}" for e, name in zip(ids, names, strict=True)]
        sentences.append(
            "Zero-cost experts, on every rank, without capacity and never dispatched: "
            f"{_shorten(each)}."
        )
    return sentences


MOMENTS = {"adamw": 2, "muon": 1}
"""Tensors of the shape of an expert's matrix that an optimizer keeps."""


def _moves(setting: Setting) -> tuple[list[str], dict[str, Any]]:
    """Describe when experts move, by which load, and the bytes of one."""
    placement, layer = setting.config.parallel.placement, setting.layer
    if placement.kind == "fixed" or layer is None:
        return [], {}
    if setting.ep == 1:
        return ["Experts do not move: with EP = 1 every rank has all of them."], {}
    optim = setting.config.optim
    moments = MOMENTS.get(optim.kind, 0)
    size = layer.weights_of_experts[0] * (4 + moments * (2 if optim.moments == "bf16" else 4))
    load = "their running mean" if placement.from_ == "ema" else "those of the last step"
    steps = "after every step" if placement.every == 1 else f"every {placement.every} steps"
    what = "weights and moments" if moments else "weights, and whatever the optimizer keeps"
    lines = [
        f"Experts move {steps}, so that the rows of the {setting.ep} ranks ({load}) are even;"
        f" not where that takes less than {MIN_GAIN:.0%} of the mean from the busiest rank.",
        f"A moved expert is {format_bytes(size)} ({what}) per copy. The choices, the model and the "
        "checkpoint are those of fixed placement.",
    ]
    return lines, {"placement_every": placement.every, "moved_expert_bytes": size}


def _copies(setting: Setting) -> tuple[list[str], dict[str, Any]]:
    """Describe the copies for the step: their bytes, and when one pays."""
    placement, layer = setting.config.parallel.placement, setting.layer
    if placement.copies == 0 or layer is None:
        return [], {}
    if setting.ep == 1:
        return ["Copies for the step: none with EP = 1, where no other rank could compute."], {}
    transfers, products = passes(setting.config.train.recompute in ("experts", "block"))
    size = layer.weights_of_experts[0] * setting.bytes_per_number
    per_ratio = transfers * setting.bytes_per_number / (2 * products)
    even = setting.tokens * setting.config.moe.top_k
    slots = " or ".join(map(str, AUTO_SLOTS)) if placement.copies == "auto" else placement.copies
    known = "measured when the run starts"
    if placement.break_even is not None:
        known = f"{plural(placement.break_even, 'row')}, as set"
    chosen = f"only where they pay; break-even: {known}" if placement.copies == "auto" else "always"
    lines = [
        f"Copies for the step: up to {slots} per rank, layer and micro-batch, {chosen}.",
        "A layer whose plan has copies takes one all-to-all more in forward and one in backward. "
        f"A copy moves {format_bytes(size)} {plural(transfers, 'time')} (weights there, gradients "
        f"back) and pays from {per_ratio:.3g} rows on for each FLOP that a rank computes in the "
        f"time of one byte: {100 * per_ratio:,.0f} rows at 100 FLOP per byte, "
        f"{1000 * per_ratio:,.0f} at 1,000. Evenly divided, a rank computes {even:,} rows per layer"
        " and micro-batch.",
    ]
    return lines, {
        "copies": placement.copies,
        "copy_bytes": transfers * size,
        "copy_break_even": placement.break_even,
        "copy_break_even_per_flop_per_byte": per_ratio,
    }


def _shorten(each: list[str]) -> str:
    return ", ".join(each if len(each) <= MAX_LINES else [*each[:3], "...", each[-1]])


def explain_modules(setting: Setting) -> Section | None:
    """Explain the attached modules and their routing; None for a network without modules."""
    modular = setting.config.modular
    if modular.bank == "none":
        return None
    start = "the seed" if modular.core is None else modular.core
    sentences = [
        f"{plural(modular.modules, 'module')} of kind {modular.bank} at each of "
        f"{target_pattern(modular)}, divided over {plural(setting.ep, 'rank')}.",
        _module_routing(modular),
        f"{TRAINED[modular.train]} The weights start from {start}.",
    ]
    numbers = {
        "bank": modular.bank,
        "modules": modular.modules,
        "choices": modules_per_token(modular),
        "train": modular.train,
    }
    return Section("modules", "Modules", sentences, numbers)


def _module_routing(modular: ModularConfig) -> str:
    aggregated = f"their outputs are aggregated by {modular.aggregation}."
    if is_learned(modular):
        return (
            f"A learned router ({modular.routing}) sends each {modular.per} to "
            f"{modules_per_token(modular)} of them; {aggregated}"
        )
    rule = "by the domain of its sequence"
    if modular.routing == "constant":
        rule = "with the same weights for all tokens"
    return f"Each token is sent to {modules_per_token(modular)} of them, {rule}; {aggregated}"
