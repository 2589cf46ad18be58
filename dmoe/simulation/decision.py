"""What pays beside the layout: capacity factors, pools and copies, by the choices of a load.

The choices are held fixed, since what another capacity would have taught the router is in no trace.
A change is judged by the tokens per second whose assignments are not dropped,

    tokens of a step * (1 - drop rate) / seconds of a step

at the best layout. Copies (`parallel.placement.copies`) make the busiest rank's rows fewer, and
cost an all-to-all of the copied weights per layer and direction: at most as if one rank sent all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from dmoe.config.errors import ConfigError
from dmoe.config.rules import check, moe_blocks
from dmoe.config.schema import CapacityConfig, Config
from dmoe.distributed.fake_world import Collective
from dmoe.distributed.placement.copy_cost import passes
from dmoe.report.format import (
    BYTES_PER_NUMBER,
    format_bytes,
    format_duration,
    format_percent,
    text_table,
)
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.load import Load, ReplayedLoad
from dmoe.simulation.replay import expert_weights
from dmoe.simulation.search import Estimate, Layout, Search, exchanges
from dmoe.simulation.step_time import collective_seconds

POOLS, COPIES = (2, 4), (1, 2)
PAYS = 1.01
"""Tokens per second over those as planned from which a change is worth its trouble."""


@dataclass(frozen=True)
class Option:
    """A change of the config at the best layout."""

    change: str
    """Override of the config; empty: as planned."""
    busiest: float = 0.0
    """Rows of the busiest rank over those of a balanced router, in the mean."""
    drop_rate: float = 0.0
    seconds: float = 0.0
    """Of a step."""
    peak: int = 0
    fits: bool = False
    gain: float = 0.0
    """Tokens per second that are not dropped, over those as planned."""
    problem: str = ""
    """Why the config cannot have it."""

    @property
    def pays(self) -> bool:
        """Whether it fits and trains more tokens per second."""
        return self.fits and self.gain >= PAYS


@dataclass(frozen=True)
class Plan:
    """The answer for one number of ranks."""

    world: int
    cluster: Cluster
    usable: float
    """Bytes of a device that tensors may take."""
    given: Estimate | ConfigError
    """The layout of the config itself, or why it cannot run."""
    best: list[Estimate]
    """At most three that fit, the fastest first."""
    fitting: list[Estimate]
    """All that fit, most of them composed."""
    failed: list[tuple[str, str]]
    """Layouts that were left out, and why."""
    nearest: Estimate | None
    """If none fits: the one that needs least."""
    options: list[Option]
    """Changes beside the best layout; the first is none."""
    load: Load
    tokens_per_step: int
    flops_per_token: float
    vocabulary: int


class Change(NamedTuple):
    """A config and a load in place of those of a search."""

    name: str
    config: Config
    load: Load
    layout: Layout
    copies: int = 0


def options(
    search: Search, best: Estimate, usable: float, factors: list[float | None]
) -> list[Option]:
    """Judge changes at the best layout; the first is none.

    Args:
        search: of the plan.
        best: the layout.
        usable: bytes that the tensors of a rank may take.
        factors: capacity factors that the user asked for.
    """
    found = [_measure(search, best, usable, Change("", search.config, search.load, best.layout))]
    for change in _changes(search.config, search.load, best.layout, factors):
        try:
            check(change.layout.apply(change.config), search.world)
            option = _measure(search, best, usable, change)
        except ConfigError as error:
            option = Option(change.name, problem=str(error))
        found.append(option)
    rate = (1 - found[0].drop_rate) / found[0].seconds
    return [
        option if option.problem else replace(option, gain=_rate(option) / rate) for option in found
    ]


def with_best_exchange(search: Search, best: list[Estimate], usable: float) -> list[Estimate]:
    """Give each layout the faster exchange that fits; return them with the fastest first."""
    others = [
        estimate.layout._replace(exchange=exchange)
        for estimate in best
        for exchange in exchanges(search.config)[1:]
        if estimate.layout.ep > 1 and search.allows(estimate.layout._replace(exchange=exchange))
    ]
    search.run(*(request for layout in others for request in search.requests(layout)))
    found = {estimate.layout._replace(exchange=""): estimate for estimate in best}
    for layout in others:
        other, mine = search.estimate(layout, usable), found[layout._replace(exchange="")]
        if other.fits and other.time.total < mine.time.total:
            found[layout._replace(exchange="")] = other
    return sorted(found.values(), key=lambda e: e.time.total)


def _rate(option: Option) -> float:
    return (1 - option.drop_rate) / option.seconds


def _changes(
    config: Config, load: Load, layout: Layout, factors: list[float | None]
) -> Iterator[Change]:
    """Yield the capacity factors that were asked for, and what answers an uneven load."""
    limit, placement = config.moe.capacity, config.parallel.placement
    packed = layout._replace(exchange="packed") if layout.exchange else layout
    also = " moe.exchange=packed" if packed != layout else ""
    for factor in factors:
        changed = replace(limit, factor=factor)
        if factor is None:
            changed = replace(changed, pool=1, pool_floor=1.0)
        other = (
            load.changed(changed, placement)
            if isinstance(load, ReplayedLoad)
            else replace(load, capacity=factor)
        )
        name = f"moe.capacity.factor={'null' if factor is None else f'{factor:g}'}"
        made = _with_capacity(config, changed)
        yield (
            Change(name, made, other, layout)
            if factor
            else Change(name + also, made, other, packed)
        )
    if not isinstance(load, ReplayedLoad):
        return
    for pool in POOLS if limit.factor is not None and limit.pool == 1 else ():
        changed = replace(limit, pool=pool)
        other = load.changed(changed, placement)
        yield Change(f"moe.capacity.pool={pool}", _with_capacity(config, changed), other, layout)
    for copies in COPIES if layout.ep > 1 and placement.copies == 0 else ():
        moved = replace(placement, copies=copies)
        made = replace(config, parallel=replace(config.parallel, placement=moved))
        name = f"parallel.placement.copies={copies}{also}"
        yield Change(name, made, load.changed(limit, moved), packed, copies)


def _with_capacity(config: Config, limit: CapacityConfig) -> Config:
    return replace(config, moe=replace(config.moe, capacity=limit))


def _measure(search: Search, best: Estimate, usable: float, change: Change) -> Option:
    """Run the best layout with a change. Raises ConfigError."""
    layout, load = change.layout, change.load
    # copies move rows, which the load of the rank says
    config = search.config if change.copies else change.config
    run = search.changed(config, load)
    (used, _, _), (_, times, _) = run.run(*run.requests(layout))
    seconds, size = _copy_cost(search, best, change) if change.copies else (0.0, 0)
    return Option(
        change.name,
        load.mean_max(*layout.shape),
        load.drop_rate(*layout.shape),
        times.total + seconds,
        used.peak + size,
        used.peak + size <= usable,
    )


def _copy_cost(search: Search, best: Estimate, change: Change) -> tuple[float, int]:
    """Return seconds per step and bytes per rank of copies, at most."""
    layout, config, load = change.layout, change.config, change.load
    assert isinstance(load, ReplayedLoad)
    steps, layers = load.traffic(*layout.shape), len(moe_blocks(config))
    accumulation, replayed, ranks, ep = steps[0].sent_ALWP.shape
    plans = len(steps) * accumulation * replayed * (ranks // ep)
    copies = sum(step.copies for step in steps) / plans
    size = expert_weights(config) * BYTES_PER_NUMBER[search.precision]
    transfers, _ = passes(layout.recompute in ("experts", "block"))
    sent = Collective("all_to_all", "ep", ep, round(copies * size))
    of_group: Any = SimpleNamespace(group_names={"ep": "ep"})
    seconds = collective_seconds(sent, of_group, search.cluster, ep)
    # kept for the backward, and the gradients of one layer
    held = round((layers + 1) * change.copies * size)
    return best.accumulation * layers * transfers * seconds, held


def beside_the_layout(options: list[Option], load: Load) -> list[str]:
    """Return the changes beside the best layout as a table, and what pays."""
    lines = ["Beside the layout"]
    if not load.is_recorded:
        lines.append(
            "  Copies and pools of experts: nothing is claimed, since only the choices of tokens "
            "say what they gain (--trace RUN, or --workload W2)."
        )
    if len(options) < 2:
        return lines if not load.is_recorded else []
    lines.append(
        "  The choices, the layout and the batch are held fixed: what a router would learn under "
        "another capacity is in no trace. A capacity or a pool changes what is dropped, so the "
        "model; copies do not."
    )
    head = ("change", "busiest\nrank", "dropped", "per step", "tokens/s\nkept", "memory", "")
    rows = [_option_row(option) for option in options if not option.problem]
    lines += text_table(head, rows, 110, 2)
    lines += [f"  {o.change}: cannot be had: {o.problem}" for o in options if o.problem]
    for words, prefix in KINDS.items():
        of_kind = [o for o in options if o.change.startswith(prefix) and not o.problem]
        paying = max((o for o in of_kind if o.pays), key=lambda o: o.gain, default=None)
        if paying is not None:
            lines.append(
                f"  {words} pay: {paying.change}, {paying.gain - 1:+.1%} tokens kept per s."
            )
        elif of_kind:
            lines.append(f"  {words} do not pay here.")
    return lines


KINDS = {
    "Other capacity factors": "moe.capacity.factor",
    "Pools": "moe.capacity.pool",
    "Copies": "parallel.placement.copies",
}
"""Kinds of changes, and how their overrides begin."""


def _option_row(option: Option) -> list[str]:
    verdict = "pays" if option.pays else "" if option.fits else "does not fit"
    return [
        option.change or "as planned",
        f"{option.busiest:.3f}",
        format_percent(option.drop_rate),
        format_duration(option.seconds),
        f"{option.gain:.3f} x",
        format_bytes(option.peak),
        verdict,
    ]
