"""The layouts of a config, and their dry runs: each done once, several at a time."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple, cast

from dmoe.config.errors import ConfigError
from dmoe.config.rules import batching, check, expert_parallel, moe_blocks
from dmoe.config.rules.parallel import can_share, shares_something
from dmoe.config.schema import Config
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.dry_run import block_kinds, dry_run
from dmoe.simulation.load import Load
from dmoe.simulation.memory import Memory, memory, totals
from dmoe.simulation.step_time import StepTime, step_time

RECOMPUTE = ("none", "activation", "experts", "block")
MAX_EP_SIZES = 3
WORKERS = min(2, os.cpu_count() or 1)
"""Dry runs at a time."""


class Layout(NamedTuple):
    """The fields that a plan may choose."""

    ep: int
    mode: str
    micro_batch: int
    recompute: str
    exchange: str = ""
    """Empty: that of the config, which can have no other."""

    def fields(self) -> str:
        """Return the layout as overrides of a config."""
        fields = (
            f"parallel.ep={self.ep} parallel.mode={self.mode} "
            f"train.micro_batch={self.micro_batch} train.recompute={self.recompute}"
        )
        return fields + (f" moe.exchange={self.exchange}" if self.exchange else "")

    @property
    def shape(self) -> tuple[int, int]:
        """What the load of the ranks depends on: EP and micro-batch."""
        return self.ep, self.micro_batch

    def apply(self, config: Config) -> Config:
        """Return the config with this layout."""
        return replace(
            config,
            moe=replace(config.moe, exchange=cast(Any, self.exchange or config.moe.exchange)),
            parallel=replace(config.parallel, ep=self.ep, mode=cast(Any, self.mode)),
            train=replace(
                config.train, micro_batch=self.micro_batch, recompute=cast(Any, self.recompute)
            ),
        )


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one layout."""

    layout: Layout
    accumulation: int
    memory: Memory
    time: StepTime
    fits: bool
    exact: bool = True
    """False: composed from the runs of other layouts."""
    peak_at: dict[str, int] | None = None
    """Peak by load: balanced, p99 and worst."""
    rows_at: dict[str, int] | None = None
    """Rows that a layer sends and receives, in bytes, by load: p50, p99 and worst."""
    kept_at: dict[str, int] | None = None
    """Activations that a micro-batch keeps for its backward, by `train.recompute`."""
    other_mode: dict[str, Memory] | None = None
    """Memory with the other `parallel.mode`, by its name; empty if it cannot run."""
    sent_at: dict[str, int] | None = None
    """Bytes that the busiest rank sends in a step by all-to-all, by load: p50, p99 and worst."""


Request = tuple[Layout, float]
"""A layout, and the rows that one rank receives over the mean."""


class Measured(NamedTuple):
    """The dry run of one request."""

    memory: Memory
    time: StepTime
    exchange: int
    """Bytes that the rank sends in a step by all-to-all."""


@dataclass
class Search:
    """The dry runs of one plan, each done once, several at a time."""

    config: Config
    world: int
    cluster: Cluster
    precision: str
    load: Load
    num_outputs: int
    parameters: tuple[int, int]
    """Dense ones, and those of all experts."""
    kinds: list[str] = field(default_factory=list)
    """Kind of each block of the model; empty: found here."""

    def __post_init__(self) -> None:
        self.kinds = self.kinds or block_kinds(self.config, self.num_outputs)
        self.seen: dict[Request, Measured] = {}
        # what the parent has imported is not collected again in each dry run
        many = partial(ProcessPoolExecutor, WORKERS, get_context("fork"), gc.freeze)
        self.pool = many() if WORKERS > 1 else None

    def state(self, ep: int, mode: str) -> float:
        """Return the bytes of weights, gradients and moments in a layout, from any run."""
        used, world = next(iter(self.seen.values())).memory, self.world
        dense, experts = self.parameters
        divided = (dense + experts) / world if mode == "fsdp" else dense + experts / ep
        return divided * used.state / (used.dense_parameters + used.expert_parameters)

    def run(self, *requests: Request) -> list[Measured]:
        """Run layouts. Raises ConfigError for one that cannot run."""
        new = [request for request in dict.fromkeys(requests) if request not in self.seen]
        for layout, _ in new:
            check(layout.apply(self.config), self.world)
        measure = partial(
            _measure, self.config, self.world, self.cluster, self.precision, self.num_outputs,
            self.kinds,
        )  # fmt: skip
        run = map if self.pool is None or len(new) < 2 else self.pool.map
        self.seen |= dict(zip(new, run(measure, new), strict=True))
        return [self.seen[request] for request in requests]

    def requests(self, layout: Layout) -> list[Request]:
        """Return what an estimate of a layout runs."""
        loads = self.load.p99(*layout.shape), self.load.mean_max(*layout.shape)
        return [(layout, load) for load in loads]

    def requests_of_given(self) -> list[Request]:
        """Return what an estimate of the config's own layout runs; nothing if it cannot run."""
        try:
            layout = given_layout(self.config, self.world)
            return self.requests(layout) if self.allows(layout) else []
        except ConfigError:  # also of a trace that is too short for its micro-batch
            return []

    def allows(self, layout: Layout) -> bool:
        """Return whether the config can have a layout."""
        try:
            check(layout.apply(self.config), self.world)
        except ConfigError:
            return False
        return True

    def estimate(self, layout: Layout, usable: float) -> Estimate:
        """Return the estimate of a layout: memory at the 99th percentile, time in the mean."""
        (used, _, _), (_, times, _) = self.run(*self.requests(layout))
        accumulation = batching(layout.apply(self.config), self.world).accumulation
        peaks = {"p99": used.peak}
        return Estimate(layout, accumulation, used, times, used.peak <= usable, peak_at=peaks)

    def with_extremes(self, estimate: Estimate) -> Estimate:
        """Return an estimate with memory and exchange at the loads of the mean and the worst.

        What is sent grows with the rows, so that of the median is on the line of two others.
        """
        layout, load = estimate.layout, self.load
        loads = [load.mean_max(*layout.shape), load.p99(*layout.shape), load.worst(layout.ep)]
        mean, p99, worst = self.run(*((layout, load) for load in loads))
        share = (load.quantile(0.5, *layout.shape) - loads[0]) / max(1e-9, loads[2] - loads[0])

        def by_load(least: int, high: int, most: int) -> dict[str, int]:
            return {"p50": round(least + share * (most - least)), "p99": high, "worst": most}

        return replace(
            estimate,
            peak_at={"mean": mean.memory.peak, "p99": p99.memory.peak, "worst": worst.memory.peak},
            rows_at=by_load(*(run.memory.exchange for run in (mean, p99, worst))),
            sent_at=by_load(*(run.exchange for run in (mean, p99, worst))),
        )

    def with_choices(self, estimate: Estimate) -> Estimate:
        """Return an estimate with the activations of each `train.recompute`, and the other mode.

        Costs a forward for each, and a step.
        """
        mine, load = estimate.layout, self.load.p99(*estimate.layout.shape)
        others = [mine._replace(recompute=choice) for choice in RECOMPUTE]
        run = [(other, load) for other in others if other != mine and self.allows(other)]
        fixed = (self.config, self.world, self.cluster.device, self.precision, self.num_outputs)
        count = partial(_kept, *fixed, self.kinds)
        found = map(count, run) if self.pool is None else self.pool.map(count, run)
        mode = "fsdp" if mine.mode == "ddp" else "ddp"
        other, used = mine._replace(mode=mode), dict[str, Memory]()
        if self.world > 1 and self.allows(other):
            used[mode] = self.run((other, load))[0].memory
        kept = {mine.recompute: estimate.memory.activations}
        kept |= {layout.recompute: size for (layout, _), size in zip(run, found, strict=True)}
        kept = {name: kept[name] for name in RECOMPUTE if name in kept}
        return replace(estimate, kept_at=kept, other_mode=used)

    def nearest(self, found: list[Estimate], usable: float) -> Estimate:
        """Return the layout that needs least, run exactly."""
        least = min(found, key=lambda e: e.memory.peak)
        return self.with_choices(self.estimate(least.layout, usable))

    def changed(self, config: Config, load: Load) -> Search:
        """Return a search of another config and load, with the same workers."""
        other = copy(self)
        other.config, other.load = config, load
        if config is not self.config:
            other.seen = {}
        return other

    def close(self) -> None:
        """End the worker processes."""
        if self.pool is not None:
            self.pool.shutdown()


def _measure(
    config: Config, world: int, cluster: Cluster, precision: str, num_outputs: int,
    kinds: list[str], request: Request,
) -> Measured:  # fmt: skip
    """Run one layout; in a worker process too."""
    layout, load = request
    record = dry_run(
        layout.apply(config),
        world,
        precision,
        cuda=cluster.device == "cuda",
        load=load,
        num_outputs=num_outputs,
        kinds=kinds,
    )
    _, collectives = totals(record)
    sent = sum(c.sent * n for c, n in collectives.items() if c.name == "all_to_all")
    return Measured(memory(record), step_time(record, cluster, layout.ep), sent)


def _kept(
    config: Config, world: int, device: str, precision: str, num_outputs: int, kinds: list[str],
    request: Request,
) -> int:  # fmt: skip
    """Return the activations that one forward keeps; in a worker process too."""
    layout, load = request
    cuda = device == "cuda"
    more: dict[str, Any] = {"num_outputs": num_outputs, "kinds": kinds, "forward_only": True}
    run = dry_run(layout.apply(config), world, precision, cuda=cuda, load=load, **more)
    return memory(run).activations


def given_layout(config: Config, world: int) -> Layout:
    """Return the layout that the config itself has. Raises ConfigError."""
    micro_batch = batching(config, world).micro_batch
    ep = expert_parallel(config, world)
    exchange = config.moe.exchange if exchanges(config) else ""
    return Layout(ep, config.parallel.mode, micro_batch, config.train.recompute, exchange)


def exchanges(config: Config) -> list[str]:
    """List the exchanges to try, that of the config first; none where there is no choice."""
    if not moe_blocks(config) or config.moe.capacity.factor is None:
        return []
    mine = config.moe.exchange
    return [mine, "padded" if mine == "packed" else "packed"]


def ep_sizes_of(config: Config, world: int, cluster: Cluster) -> list[int]:
    """List the EP sizes to try: 1, the largest, that of a node, and between."""
    if not shares_something(config):
        return [1]
    experts = max(config.moe.num_experts, config.modular.modules)
    fits = [n for n in range(1, min(world, experts) + 1) if world % n == 0 and can_share(config, n)]
    wanted = {fits[0], fits[-1]}
    wanted |= {max(n for n in fits if n <= cluster.devices)}
    between = [n for n in fits if n not in wanted]
    while between and len(wanted) < MAX_EP_SIZES:
        wanted.add(between.pop())
    return sorted(wanted)


def micro_batches(config: Config, world: int) -> list[int]:
    """List the micro-batches to try: powers of two, and the share of a rank, that divide it."""
    share = config.train.global_batch // (world * config.parallel.virtual_ranks)
    return [n for n in (1, 2, 4, 8, 16, 32, share) if n and share % n == 0][:6] if share else [1]
