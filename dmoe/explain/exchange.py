"""What travels between ranks, how often and how much.

Letters: T tokens of one process, D width, E experts, K experts a token, G groups, C slots, EP expert-parallel degree.
"""

from __future__ import annotations

from typing import Any

from dmoe.config.expert_shapes import all_choices
from dmoe.explain.section import Section, count, size_of
from dmoe.explain.setting import Setting

COLLECTIVES = {"packed": (3, 2, 1), "padded": (2, 2, 0)}
"""Forward, backward, host syncs of one layer; tests/distributed counts them."""


def describe(setting: Setting) -> Section | None:
    if setting.layer is None:
        return None
    kind = setting.config.moe.exchange
    if setting.ep == 1:
        words = ["EP = 1: every rank has all experts, so no token travels.", _gradients(setting)]
        numbers: dict[str, Any] = {
            "kind": kind,
            "bytes_forward": 0,
            "collectives_forward": 0,
            "collectives_backward": 0,
        }
        return Section("exchange", "Exchange", words, numbers)
    forward, backward, syncs = COLLECTIVES[kind]
    syncs += kind == "packed" and bool(
        setting.config.moe.experts.shapes
    )  # where the rows of a class begin
    rows = rows_out(setting)
    size = rows * setting.config.model.dim * setting.itemsize
    layers = len(setting.model.moe_layers())
    trips = 6 if setting.config.train.recompute else 4
    step_size = trips * layers * size * setting.batching.accumulation
    others = "the other rank" if setting.ep == 2 else f"the {setting.ep - 1} other ranks"
    words = [
        _kind(kind),
        f"Collectives of one MoE layer: {forward} forward{_counts(kind)}, {backward} backward, {count(syncs, 'host sync')}"
        f"{'; recomputation repeats the forward ones' if setting.config.train.recompute else ''}.",
        f"One all-to-all takes {size_of(size)} out of a rank{_expected(setting)}: {rows:,.0f} rows of "
        f"{setting.config.model.dim} numbers in {setting.precision} for {others} of its EP group. With {trips - 2} forward "
        f"and 2 backward in each of {count(layers, 'MoE layer')}, {size_of(step_size)} leave a rank in a step.",
        *_global_loss(setting),
        _gradients(setting),
    ]
    numbers = {
        "kind": kind,
        "collectives_forward": forward,
        "collectives_backward": backward,
        "host_syncs": syncs,
        "rows_forward": rows,
        "bytes_forward": size,
        "bytes_exact": kind == "padded",
        "bytes_per_step": step_size,
        "precision": setting.precision,
    }
    return Section("exchange", "Exchange", words, numbers)


def rows_out(setting: Setting) -> float:
    """Rows that leave one rank in one all-to-all: exact if padded; if packed, the expectation where every expert is chosen equally."""
    moe, slots = setting.config.moe, setting.slots()
    most = setting.tokens  # of a group that is spread over the ranks, one rank cannot fill more
    offered = (
        None
        if slots.capacity is None
        else setting.places * slots.groups * min(slots.capacity, most)
    )
    if moe.exchange == "padded":
        assert offered is not None
        rows: float = offered
    else:
        chosen = (
            setting.tokens * moe.top_k * moe.num_experts / all_choices(moe)
        )  # those of zero cost stay at home
        rows = chosen if offered is None else min(chosen, offered)
    return rows * (setting.ep - 1) / setting.ep


def _kind(kind: str) -> str:
    if kind == "padded":
        return "Padded: every expert's slots travel, full or empty, so every shape is known beforehand."
    return "Packed: exactly the rows there are, after their numbers."


def _counts(kind: str) -> str:
    return " (one of them a few counts)" if kind == "packed" else ""


def _expected(setting: Setting) -> str:
    if setting.config.moe.exchange == "padded":
        return ", always"
    if setting.config.moe.router.kind in ("adaptive", "budget"):
        return " if every token takes the most experts it may, chosen equally often"
    return " if the experts are chosen equally often"


def _global_loss(setting: Setting) -> list[str]:
    balance = setting.config.moe.balance
    if not balance.switch or balance.switch_level != "global" or setting.world == 1:
        return []
    return ["The global switch loss adds one all-reduce of E + 1 numbers a layer."]


def _gradients(setting: Setting) -> str:
    if setting.world == 1:
        return "One rank: no gradient travels either."
    copies = (
        ""
        if setting.edp == 1 or setting.layer is None
        else f", those of experts over their {setting.edp} copies"
    )
    how = (
        "reduced to the rank that keeps them (FSDP2)"
        if setting.config.parallel.mode == "fsdp"
        else "summed (DDP)"
    )
    return (
        f"Dense gradients are {how} over all {setting.world} ranks{copies}; one control reduction a step carries norm, losses and "
        "counts."
    )
