"""Batch, routing, load balancing and capacity, in training and in evaluation.

Letters: E experts, K experts per token, T_g tokens of a group, G groups of one forward, C slots of
one (group, expert).
"""

from __future__ import annotations

from typing import Any

from dmoe.config.expert_shapes import count_choices
from dmoe.config.recommended import out_of_range
from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import MoEConfig
from dmoe.explain.setting import Section, Setting
from dmoe.report.capacity import GROUP, dropless_sentence, overflow_sentences, pool_sentences
from dmoe.report.format import plural
from dmoe.report.sentences import (
    aux_coefficients,
    balance_sentences,
    batch_sentence,
    routing_sentences,
)

KIND_FIELDS = ("groups", "topk_groups", "top_p", "k_min", "min_weight", "budget", "per")
"""Fields of `moe.router` that are reported if the router's kind reads them."""


def explain_routing(setting: Setting) -> Section | None:
    """Explain score, choice, weights and noise; None for a dense model."""
    if setting.layer is None:
        return None
    moe = setting.config.moe
    reads = router_spec(moe.router.kind).reads
    numbers: dict[str, Any] = {
        "kind": moe.router.kind,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "scale": moe.router.scale,
    }
    numbers |= {name: getattr(moe.router, name) for name in KIND_FIELDS if name in reads}
    if "k_min" in reads:
        numbers["k_max"] = moe.top_k
    return Section("routing", "Routing", routing_sentences(setting.config), numbers)


def explain_balance(setting: Setting) -> Section | None:
    """Explain auxiliary losses and bias; None for a dense model."""
    if setting.layer is None:
        return None
    balance = setting.config.moe.balance
    numbers: dict[str, Any] = {
        "coefficients": aux_coefficients(balance),
        "switch_level": balance.switch_level,
        "bias_rate": balance.bias,
    }
    return Section("balance", "Balance", balance_sentences(setting.config.moe), numbers)


def explain_recommended(setting: Setting) -> Section | None:
    """List settings outside of the ranges in the literature; None if there is none."""
    remarks = out_of_range(setting.config) if setting.layer is not None else []
    if not remarks:
        return None
    numbers = {
        remark.field: {
            "value": remark.value,
            "low": remark.range.low,
            "high": remark.range.high,
            "source": remark.range.source,
        }
        for remark in remarks
    }
    sentences = [str(remark) for remark in remarks]
    return Section("recommended", "Outside of recommended ranges", sentences, numbers)


def explain_batch(setting: Setting) -> Section:
    """Explain how the global batch is divided over ranks and accumulation steps."""
    train, task, batching = setting.config.train, setting.task, setting.batching
    virtual = setting.config.parallel.virtual_ranks
    step_tokens = train.global_batch * task.targets_per_sample
    unit = task.unit if task.targets_per_sample == 1 else "sequence"
    sentences = [
        batch_sentence(setting.config),
        f"Division: {plural(setting.world, 'rank')} x {plural(virtual, 'virtual rank')} x "
        f"micro-batch {batching.micro_batch} x {plural(batching.accumulation, 'accumulation step')}"
        f" = {plural(train.global_batch, unit)} per step.",
        f"One forward of one process has {setting.tokens:,} {task.unit}s "
        f"({plural(setting.sequences, unit)}). The {unit}s of a step depend on the seed and the "
        "step only, not on the number of ranks.",
    ]
    if task.targets_per_sample == 1:
        sentences.append(
            "For the layers, a sample is a sequence of one token, or of one token per stream with "
            "model.fusion=gated."
        )
    numbers = {
        "world": setting.world,
        "virtual_ranks": virtual,
        "micro_batch": batching.micro_batch,
        "accumulation": batching.accumulation,
        "global_batch": train.global_batch,
        "seq_len": task.targets_per_sample,
        "tokens_per_step": step_tokens,
        "tokens_per_forward": setting.tokens,
        "steps": train.steps,
        "tokens": step_tokens * train.steps,
    }
    return Section("batch", "Batch", sentences, numbers)


def explain_capacity(setting: Setting) -> Section | None:
    """Explain expert capacity and overflow; None for a dense model."""
    if setting.layer is None:
        return None
    slots, moe = setting.slots(), setting.config.moe
    capacity = moe.capacity
    if slots.capacity is None:
        absent = {"factor": None, "slots": None}
        return Section("capacity", "Capacity", [dropless_sentence(moe)], absent)
    tokens = _group_tokens(setting)
    fair_share = moe.top_k * tokens / count_choices(moe)
    total = slots.capacity * slots.groups * moe.num_experts
    extent = "in one forward of one process"
    if capacity.group == "global":
        extent = "over all ranks"
    sentences = [
        f"Group: {GROUP[capacity.group]}; {plural(slots.groups, 'group')} of "
        f"{plural(tokens, 'token')} {extent}.",
        f"Capacity: {plural(slots.capacity, 'slot')} per expert and group: "
        f"{_formula(moe, tokens)}. The fair share is {fair_share:g} assignments, so "
        f"{'a pool' if capacity.pool > 1 else 'an expert'} drops those beyond "
        f"{slots.capacity / fair_share:.4g} times the fair share. All experts and groups: "
        f"{total:,} slots.",
        *pool_sentences(capacity),
        *overflow_sentences(capacity),
    ]
    numbers = {
        "factor": capacity.factor,
        "group": capacity.group,
        "groups": slots.groups,
        "tokens_per_group": tokens,
        "slots": slots.capacity,
        "slots_total": total,
        "fair_share": fair_share,
        "load_over_fair_share": slots.capacity / fair_share,
        "pool": capacity.pool,
        "pool_slots": capacity.pool * slots.capacity,
    }
    return Section("capacity", "Capacity", sentences, numbers)


def _group_tokens(setting: Setting) -> int:
    """Return T_g."""
    if setting.config.moe.capacity.group == "global":
        return setting.tokens * setting.world
    return setting.tokens // setting.slots().groups


def _formula(moe: MoEConfig, tokens: int) -> str:
    capacity = moe.capacity
    unbounded = f"ceil({capacity.factor:g} x {moe.top_k} x {tokens} / {count_choices(moe)})"
    return f"{unbounded}, at least {capacity.min_capacity} and at most {tokens}"


def explain_evaluation(setting: Setting) -> Section:
    """Explain what differs in evaluation and generation."""
    train, data = setting.config.train, setting.config.data
    unit, metric, whole, few = "sample", "the accuracy", "samples", ""
    if setting.task.name == "language_modelling":
        unit, metric, whole = "sequence", "bits per byte", "documents"
        few = "; of fewer than 50 the end of each"
    held_out = f"{data.holdout:.0%} of the {whole}, by a hash of their content{few}."
    if data.validation_source is not None:
        held_out = f"data.validation_source={data.validation_source}."
    schedule = "At the end"
    if train.eval_every:
        schedule = f"Every {plural(train.eval_every, 'step')} and at the end"
    sentences = [
        f"{schedule}: the mean loss over the first "
        f"{plural(train.eval_sequences, f'held-out {unit}')}, and {metric}; equal on any number of "
        f"ranks. Held out: {held_out}"
    ]
    numbers = {
        "every": train.eval_every,
        "sequences": train.eval_sequences,
        "holdout": data.holdout,
        "slots": None,
    }
    if setting.layer is not None:
        slots = setting.slots(training=False).capacity
        numbers["slots"] = slots
        capacity = _evaluation_capacity(setting, slots)
        sentences.append(f"Capacity: {capacity} No noise and no auxiliary loss.")
    return Section("evaluation", "Evaluation", sentences, numbers)


def _evaluation_capacity(setting: Setting, slots: int | None) -> str:
    moe = setting.config.moe
    if slots is not None:
        return f"factor {moe.capacity.eval_factor:g}, {plural(slots, 'slot')} per group."
    if moe.exchange == "padded" and setting.ep > 1:
        return "dropless, and therefore with the packed exchange: padded slots need a capacity."
    return "dropless."
