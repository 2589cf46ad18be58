"""The layouts of a config, and their dry runs: each done once, several at a time."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple, cast

from dmoe.config.rules import batching, check, expert_parallel
from dmoe.config.rules.parallel import can_share, shares_something
from dmoe.config.schema import Config
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.dry_run import block_kinds, dry_run
from dmoe.simulation.load import Load
from dmoe.simulation.memory import Memory, memory
from dmoe.simulation.step_time import StepTime, step_time

MAX_EP_SIZES = 3
WORKERS = min(2, os.cpu_count() or 1)
"""Dry runs at a time."""


class Layout(NamedTuple):
    """The fields that a plan may choose."""

    ep: int
    mode: str
    micro_batch: int
    recompute: str

    def fields(self) -> str:
        """Return the layout as overrides of a config."""
        return (
            f"parallel.ep={self.ep} parallel.mode={self.mode} "
            f"train.micro_batch={self.micro_batch} train.recompute={self.recompute}"
        )

    def apply(self, config: Config) -> Config:
        """Return the config with this layout."""
        return replace(
            config,
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


Request = tuple[Layout, float]
"""A layout, and the rows that one rank receives over the mean."""


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

    def __post_init__(self) -> None:
        self.kinds = block_kinds(self.config, self.num_outputs)
        self.seen: dict[Request, tuple[Memory, StepTime]] = {}
        self.pool = ProcessPoolExecutor(WORKERS, get_context("fork")) if WORKERS > 1 else None

    def state(self, ep: int, mode: str) -> float:
        """Return the bytes of weights, gradients and moments in a layout, from any run."""
        (used, _), world = next(iter(self.seen.values())), self.world
        dense, experts = self.parameters
        divided = (dense + experts) / world if mode == "fsdp" else dense + experts / ep
        return divided * used.state / (used.dense_parameters + used.expert_parameters)

    def run(self, *requests: Request) -> list[tuple[Memory, StepTime]]:
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

    def estimate(self, layout: Layout, usable: float) -> Estimate:
        """Return the estimate of a layout at the load of the 99th percentile."""
        used, times = self.run((layout, self.load.p99(layout.ep)))[0]
        accumulation = batching(layout.apply(self.config), self.world).accumulation
        peaks = {"p99": used.peak}
        return Estimate(layout, accumulation, used, times, used.peak <= usable, peak_at=peaks)

    def in_the_mean(self, estimates: list[Estimate]) -> list[Estimate]:
        """Return estimates with the time of the mean slowest rank, the fastest first.

        The first one is run: in the mean, and with all tokens on one rank's experts. The others are
        faster than at the 99th percentile by the same factor.
        """
        if not estimates:
            return []
        first = min(estimates, key=lambda e: e.time.total)
        layout = first.layout
        loads = (self.load.mean_max(layout.ep), self.load.worst(layout.ep))
        (mean, times), (worst, _) = self.run(*((layout, load) for load in loads))
        factor = times.total / first.time.total
        timed = [replace(e, time=e.time.scaled(factor)) for e in estimates if e is not first]
        peaks = {"mean": mean.peak, **(first.peak_at or {}), "worst": worst.peak}
        timed.sort(key=lambda e: e.time.total)
        return [replace(first, time=times, peak_at=peaks), *timed]

    def close(self) -> None:
        """End the worker processes."""
        if self.pool is not None:
            self.pool.shutdown()


def _measure(
    config: Config, world: int, cluster: Cluster, precision: str, num_outputs: int,
    kinds: list[str], request: Request,
) -> tuple[Memory, StepTime]:  # fmt: skip
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
    return memory(record), step_time(record, cluster, layout.ep)


def given_layout(config: Config, world: int) -> Layout:
    """Return the layout that the config itself has. Raises ConfigError."""
    micro_batch = batching(config, world).micro_batch
    ep = expert_parallel(config, world)
    return Layout(ep, config.parallel.mode, micro_batch, config.train.recompute)


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
    return [n for n in (1, 2, 4, 8, 16, 32, share) if n <= share and share % n == 0][:6] or [share]
