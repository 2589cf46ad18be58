"""Answers of a trace without training: drops, imbalance and bytes under other settings.

    straggler factor   of an accumulation step and layer: max / mean of the rows that the ranks'
                       experts compute, after drops; the step waits for the slowest
    bytes              rows that leave their rank, times D, times the bytes of a number, times 4:
                       dispatch and combine, forward and backward (packed exchange); and the
                       weights of copies, out, and their gradients, back

The choices stay those of the trace, or with a bias step its scores do: what another capacity or
balance would have taught the router is not in it. Experts move and are copied by the planners of
the run, `parallel.placement`.

Letters: A accumulation steps, L MoE layers, W ranks, B samples of a step, E experts, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import count_zero_cost, expert_shapes, multiply_adds
from dmoe.config.schema import CapacityConfig, Config, PlacementConfig
from dmoe.moe.capacity import expert_capacity
from dmoe.moe.copy_planner import CopyRule, plan_copies
from dmoe.moe.placement import ExpertPlacement, contiguous_placement
from dmoe.moe.placement_plan import plan_placement
from dmoe.report.format import format_bytes, format_percent
from dmoe.simulation.drops import check_capacity, kept_experts
from dmoe.simulation.trace import Trace, by_rank, check_layout, rows_of_ranks, slots_of

TRANSFERS = 4


@dataclass(frozen=True)
class Setting:
    """Ranks and capacity that a trace is replayed with."""

    ranks: int
    ep: int
    micro_batch: int
    capacity: CapacityConfig
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Moves and copies of experts."""
    owned: ExpertPlacement | None = None
    """Where the experts are at first; None: in equal runs. See `trace.first_placement`."""
    bias: float | None = None
    """`moe.balance.bias` that the trace's experts were selected with again; None: as recorded."""

    @property
    def label(self) -> str:
        factor = self.capacity.factor
        limit = "dropless" if factor is None else f"factor {factor:g} per {self.capacity.group}"
        placement = self.placement
        moved = "" if placement.kind == "fixed" else f", {placement.kind}"
        moved += f", {placement.copies} copies" if placement.copies else ""
        moved += "" if self.bias is None else f", bias step {self.bias:g}"
        return f"{self.ranks} ranks, EP {self.ep}, {limit}{moved}"


@dataclass(frozen=True)
class StepTraffic:
    """One step under a setting."""

    step: int
    sent_ALWP: np.ndarray
    """int64: rows that each rank sends to each EP rank of its row, after drops."""
    choices_L: np.ndarray
    """int64: assignments of computed experts before drops."""
    imbalance_L: np.ndarray
    """float: max / mean of the choices of the experts."""
    copies: int = 0
    """Experts that were copied, over accumulation steps, layers and EP groups."""

    @property
    def rows_ALW(self) -> np.ndarray:
        return rows_of_ranks(self.sent_ALWP)

    @property
    def straggler_AL(self) -> np.ndarray:
        rows = self.rows_ALW
        factor: np.ndarray = rows.max(2) / np.maximum(rows.mean(2), 1e-12)
        return np.where(rows.any(2), factor, 1.0)

    @property
    def kept_L(self) -> np.ndarray:
        kept_L: np.ndarray = self.sent_ALWP.sum((0, 2, 3))
        return kept_L

    @property
    def remote(self) -> int:
        """Rows that leave their rank."""
        _, _, ranks, ep = self.sent_ALWP.shape
        own = np.arange(ranks) % ep
        stay = self.sent_ALWP[:, :, np.arange(ranks), own].sum()
        return int(self.sent_ALWP.sum() - stay)


def replay_steps(trace: Trace, setting: Setting, zero_cost: int = 0) -> Iterator[StepTraffic]:
    """Yield the traffic of every step of a trace under a setting.

    Raises:
        ConfigError: the trace cannot answer it, or numbers do not divide.
    """
    experts, ep, owned = trace.spec.experts - zero_cost, setting.ep, setting.owned
    shared = experts if owned is None else ep
    check_layout(trace.spec, setting.ranks, ep, setting.micro_batch, shared)
    check_capacity(setting.capacity, trace.has_scores, trace.has_next_choices)
    placements = [owned or contiguous_placement(experts, ep)] * trace.spec.layers
    expected_LE: np.ndarray | None = None
    moves, rule = setting.placement, copy_rule(setting.placement)
    for step in trace.steps:
        total_LE = trace.counts(step)[:, :, :experts].sum(0)
        kept_BLE, micro_batch = _kept_counts(trace, step, setting, zero_cost)
        order_LE = np.array([slots_of(placement, experts) for placement in placements])
        rows_BLE = np.pad(kept_BLE[:, :, :experts], ((0, 0), (0, 0), (0, 1)))
        placed = np.take_along_axis(rows_BLE, order_LE[None], axis=2)
        sent_ALWP, copies = (
            with_copies(placed, setting.ranks, ep, micro_batch, rule)
            if moves.copies
            else (by_rank(placed, setting.ranks, ep, micro_batch), 0)
        )
        mean_L = np.maximum(total_LE.mean(1), 1e-12)
        imbalance_L = np.where(total_LE.any(1), total_LE.max(1) / mean_L, 1.0)
        yield StepTraffic(step, sent_ALWP, total_LE.sum(1), imbalance_L, copies)
        if moves.kind == "fixed":
            continue
        rows_LE = kept_BLE[:, :, :experts].sum(0).astype(float)
        share = 1 / moves.every if moves.from_ == "ema" and expected_LE is not None else 1
        before_LE = rows_LE if expected_LE is None else expected_LE
        expected_LE = before_LE + (rows_LE - before_LE) * share if share < 1 else rows_LE
        if (step + 1) % moves.every == 0:
            pairs = zip(expected_LE.tolist(), placements, strict=True)
            placements = [plan_placement(rows_E, placement) for rows_E, placement in pairs]


def copy_rule(placement: PlacementConfig) -> CopyRule:
    """Return when experts are copied.

    Raises:
        ConfigError: `copies: auto` whose break-even only a run can measure.
    """
    if isinstance(placement.copies, int):
        return CopyRule(placement.copies)
    if placement.break_even is None:
        allowed = "auto needs the break-even, which a run measures when it starts"
        fix = "set parallel.placement.break_even"
        raise ConfigError("parallel.placement.copies", placement.copies, allowed, fix)
    return CopyRule(None, placement.break_even)


def with_copies(
    count_BLE: np.ndarray, ranks: int, ep: int, micro_batch: int, rule: CopyRule
) -> tuple[np.ndarray, int]:
    """Return the rows between ranks where hot experts are copied, and the number of copies.

    The same plan as `parallel.placement.copies` makes, of each accumulation step, layer and EP
    group. Arguments and shape as in `trace.by_rank`; experts in the order of their ranks.
    """
    samples, layers, experts = count_BLE.shape
    accumulation = samples // (ranks * micro_batch)
    shape = (accumulation, ranks, micro_batch, layers, experts)
    count_AWLE = count_BLE.reshape(shape).sum(2, dtype=np.int64)
    sent_ALWP, made = np.zeros((accumulation, layers, ranks, ep), np.int64), 0
    for a in range(accumulation):
        for layer in range(layers):
            for first in range(0, ranks, ep):
                group = slice(first, first + ep)
                plan = plan_copies(np.ascontiguousarray(count_AWLE[a, group, layer]), rule)
                edges = plan.edge_P[:-1]
                sent_ALWP[a, layer, group] = np.add.reduceat(plan.rows_PI, edges, axis=1)
                made += len(plan.moves)
    return sent_ALWP, made


def _kept_counts(
    trace: Trace, step: int, setting: Setting, zero_cost: int
) -> tuple[np.ndarray, int]:
    """Return the kept assignments by sample or rank, [B, L, E], and how many of those a rank has.

    Of a trace of counts: min(count, C) of each (group, expert), whoever is dropped.
    """
    spec, capacity, n = trace.spec, setting.capacity, setting.micro_batch
    if capacity.factor is None:
        return trace.counts(step), n
    if trace.has_choices:
        expert_NLK = trace.choices(step)
        scores, following = None, None
        if capacity.overflow == "next_choice":
            following = trace.next_choices(step)
        if capacity.priority == "score":
            read = trace.scores if following is None else trace.all_scores
            scores = read(step)
        kept_NLK = kept_experts(
            expert_NLK, scores, capacity, spec,
            ranks=setting.ranks, micro_batch=n, zero_cost=zero_cost, next_NLS=following,
        )  # fmt: skip
        return spec.count(kept_NLK).astype(np.int64), n
    if capacity.group == "global" or capacity.pool > 1:
        allowed = "needs the choices of each token, and the trace has counts"
        fix = "record it with tracking.trace=choices"
        raise ConfigError("--replay", trace.path, allowed, fix)
    count_BLE, samples = trace.counts(step), n if capacity.group == "rank" else 1
    count_GLE = count_BLE.reshape(-1, samples, *count_BLE.shape[1:]).sum(1)
    slots = expert_capacity(
        capacity.factor, samples * spec.seq_len, spec.top_k, spec.experts, capacity.min_capacity
    )
    return np.minimum(count_GLE, slots), n // samples


def expert_weights(config: Config) -> float:
    """Return the mean number of weights of an expert."""
    moe, dim = config.moe, config.model.dim
    sizes = [multiply_adds(shape, dim, dim, moe.experts.kind) for shape in expert_shapes(moe)]
    return sum(sizes) / len(sizes)


def summarize(
    trace: Trace, setting: Setting, config: Config, bytes_per_number: int
) -> dict[str, Any]:
    """Return the numbers of one row of the table, and the straggler factor of each step."""
    steps = list(replay_steps(trace, setting, count_zero_cost(config.moe.experts)))
    choices_L = np.sum([step.choices_L for step in steps], axis=0)
    dropped_L = choices_L - np.sum([step.kept_L for step in steps], axis=0)
    straggler = np.stack([step.straggler_AL for step in steps])
    remote = sum(step.remote for step in steps) * config.model.dim * TRANSFERS
    copied = sum(step.copies for step in steps) * expert_weights(config) * 2
    per_step = len(steps) * setting.ranks
    capacity = setting.capacity
    return {
        "ranks": setting.ranks,
        "ep": setting.ep,
        "micro_batch": setting.micro_batch,
        "factor": capacity.factor,
        "group": capacity.group,
        "pool": capacity.pool,
        "placement": setting.placement.kind,
        "copies": setting.placement.copies,
        "bias": setting.bias,
        "drop_rate": float(dropped_L.sum() / max(1, choices_L.sum())),
        "worst_layer_drop_rate": float((dropped_L / np.maximum(choices_L, 1)).max()),
        "expert_max_over_mean": float(np.mean([step.imbalance_L for step in steps])),
        "straggler_mean": float(straggler.mean()),
        "straggler_p99": float(np.quantile(straggler, 0.99)),
        "straggler_max": float(straggler.max()),
        "bytes_per_rank_and_step": (remote + copied) * bytes_per_number / per_step,
        "copies_per_step": sum(step.copies for step in steps) / len(steps),
        "straggler_by_step": [float(step.straggler_AL.mean()) for step in steps],
        "steps": [step.step for step in steps],
    }


HEAD = (
    *("ranks", "EP", "factor", "group", "pool", "placed", "copies", "drops"),
    *("experts\nmax/mean", "ranks\nmax/mean", "ranks\np99", "sent per\nrank, step"),
)
COPIES = HEAD.index("copies")


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells; with a column of bias steps if there are any."""
    cells = _cells(rows)
    if all(row["bias"] is None for row in rows):
        return list(HEAD), cells
    for row, line in zip(rows, cells, strict=True):
        line.insert(COPIES + 1, "as run" if row["bias"] is None else f"{row['bias']:g}")
    return [*HEAD[: COPIES + 1], "bias", *HEAD[COPIES + 1 :]], cells


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            str(row["ranks"]),
            str(row["ep"]),
            "none" if row["factor"] is None else f"{row['factor']:g}",
            row["group"],
            str(row["pool"]),
            row["placement"],
            str(row["copies"]),
            format_percent(row["drop_rate"]),
            f"{row['expert_max_over_mean']:.3f}",
            f"{row['straggler_mean']:.3f}",
            f"{row['straggler_p99']:.3f}",
            format_bytes(row["bytes_per_rank_and_step"]),
        ]
        for row in rows
    ]
