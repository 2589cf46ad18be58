"""The best layouts of a config on a cluster, why, and why the others fail.

A layout is what may change without changing the model: EP, data-parallel mode, micro-batch,
recomputation. The search runs each (EP, mode) once, at the smallest micro-batch, and learns from
three further runs what a larger micro-batch and recomputation add; the best are then run exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from dmoe.config.errors import ConfigError
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.load import Load
from dmoe.simulation.memory import Memory
from dmoe.simulation.search import (
    WORKERS,
    Estimate,
    Layout,
    Search,
    ep_sizes_of,
    given_layout,
    micro_batches,
)
from dmoe.simulation.step_time import StepTime
from dmoe.train.engine import resolve_precision
from dmoe.train.tasks import task_of

SHOWN = 3
NEAR = 1.1
"""A layout is run although it may need this much more than there is: the bound is not tight."""


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
    failed: list[tuple[str, str]]
    """Layouts that were left out, and why."""
    nearest: Estimate | None
    """If none fits: the one that needs least."""
    load: Load
    tokens_per_step: int
    flops_per_token: float
    vocabulary: int


def usable_memory(cluster: Cluster, world: int) -> float:
    """Return the bytes that the tensors of one rank may take; ranks of a CPU share its memory."""
    if cluster.device == "cuda":
        return cluster.memory - cluster.reserved
    return cluster.memory / min(world, max(world, cluster.devices)) - cluster.reserved


def plan(
    search: Search, flops_per_token: float, tokens_per_sample: int, ep_sizes: list[int] | None
) -> Plan:
    """Search the layouts of a config.

    Raises:
        ConfigError: a config that runs in no layout.
    """
    config, world, cluster = search.config, search.world, search.cluster
    usable = usable_memory(cluster, world)
    failed: list[tuple[str, str]] = []
    found = list(_screen(search, usable, failed, ep_sizes))
    given: Estimate | ConfigError
    try:
        given = search.estimate(given_layout(config, world), usable)
    except ConfigError as error:
        if not found:
            raise
        given = error
    best, beyond = _exact_best(search, found, usable)
    for ep, mode in dict.fromkeys((e.layout.ep, e.layout.mode) for e in found):
        same = [e for e in found if (e.layout.ep, e.layout.mode) == (ep, mode)]
        least = min(max(e.memory.peak, beyond.get(e.layout, 0)) for e in same)
        if least > usable:
            failed.append((_name(ep, mode), _too_large(least, usable, "needs at least")))
    failed += [(layout.fields(), _too_large(size, usable)) for layout, size in beyond.items()]
    best = search.in_the_mean(best)
    nearest = None
    if not best:
        nearest = search.estimate(min(found, key=lambda e: e.memory.peak).layout, usable)
    tokens = config.train.global_batch * tokens_per_sample
    return Plan(
        world, cluster, usable, given, best, failed, nearest, search.load, tokens, flops_per_token,
        search.num_outputs,
    )  # fmt: skip


def _exact_best(
    search: Search, found: list[Estimate], usable: float
) -> tuple[list[Estimate], dict[Layout, int]]:
    """Run the fastest layouts until `SHOWN` fit; also return the peaks of those that do not.

    A peak is a maximum of lines in the micro-batch: between the smallest one and one that was run
    it is at most on the straight line. The line is expected of other EP sizes too.
    """
    best, beyond = list[Estimate](), dict[Layout, int]()
    small = min((e.layout.micro_batch for e in found), default=1)
    base = {_key(e.layout): e.memory.peak for e in found if e.layout.micro_batch == small}
    slope: dict[tuple[str, str], float] = {}
    waiting = sorted(found, key=lambda e: e.time.total)
    while waiting and len(best) < SHOWN:
        chosen = list[Layout]()
        while waiting and len(chosen) < WORKERS:
            layout, expected = waiting[0].layout, waiting.pop(0).memory.peak
            line = slope.get((layout.mode, layout.recompute), 0.0)
            at_most = base[_key(layout)] + (layout.micro_batch - small) * line
            if max(expected, at_most) / NEAR <= usable:
                chosen.append(layout)
        search.run(*((layout, search.load.p99(layout.ep)) for layout in chosen))
        for layout in chosen:
            exact = search.estimate(layout, usable)
            if exact.fits:
                best.append(exact)
                continue
            beyond[layout] = peak = exact.memory.peak
            more = max(1, layout.micro_batch - small)
            slope[layout.mode, layout.recompute] = (peak - base[_key(layout)]) / more
    return best[:SHOWN], beyond


def _key(layout: Layout) -> tuple[int, str, str]:
    return layout.ep, layout.mode, layout.recompute


def _screen(
    search: Search, usable: float, failed: list[tuple[str, str]], ep_sizes: list[int] | None
) -> Iterator[Estimate]:
    """Yield every layout whose state fits, from few runs: see the module's docstring."""
    config, world = search.config, search.world
    sizes = ep_sizes or ep_sizes_of(config, world, search.cluster)
    share = config.train.global_batch // (world * config.parallel.virtual_ranks)
    try:
        micros = micro_batches(config, world)
        modes = ["ddp", "fsdp"] if world > 1 else [config.parallel.mode]
        near = max((n for n in sizes if n <= search.cluster.devices), default=sizes[0])
        first = Layout(near, modes[-1], micros[0], "block")
        load = search.load.p99(near)
        ends = (micros[0], next((n for n in micros if n > micros[0]), micros[0]))
        corners = [(micro, recompute) for micro in ends for recompute in ("block", "none")]
        results = dict(
            zip(
                corners,
                search.run(*((_at(first, *corner), load) for corner in corners)),
                strict=True,
            )
        )
    except ConfigError as error:
        failed.append(("every layout", str(error)))
        return
    small, beyond = list[Layout](), list[tuple[float, Layout]]()
    for ep, mode in product(reversed(sizes), modes):
        layout = Layout(ep, mode, micros[0], "block")
        try:
            check(layout.apply(config), world)
        except ConfigError as error:
            failed.append((_name(ep, mode), str(error)))
            continue
        if (state := search.state(ep, mode)) > usable:
            text = "weights, gradients and moments alone take"
            failed.append((_name(ep, mode), _too_large(state, usable, text)))
            beyond.append((state, layout))
        else:
            small.append(layout)
    small = small or [layout for _, layout in sorted(beyond)[:1]]  # then it is the nearest
    search.run(*((layout, search.load.p99(layout.ep)) for layout in small))
    for layout in small:
        used, times = search.run((layout, search.load.p99(layout.ep)))[0]
        for micro, recompute in product(dict.fromkeys(micros), ("none", "block")):
            more, slower = _delta(results, ends, micro, recompute)
            expected = replace(used, peak=used.peak + more)
            yield Estimate(
                _at(layout, micro, recompute),
                share // micro,
                expected,
                times.scaled(slower),
                expected.peak <= usable,
                exact=False,
            )


def _at(layout: Layout, micro_batch: int, recompute: str) -> Layout:
    return layout._replace(micro_batch=micro_batch, recompute=recompute)


def _delta(
    results: dict[tuple[int, str], tuple[Memory, StepTime]],
    ends: tuple[int, int],
    micro: int,
    recompute: str,
) -> tuple[int, float]:
    """Return what micro-batch and recomputation change: bytes, and a factor of the time.

    The time of a step is a / micro + b: a micro-batch has a fixed cost.
    """
    small, large = ends
    base, base_time = results[small, "block"]
    used, times = results[small, recompute]
    more, seconds = used.peak - base.peak, times.total
    if micro > small:
        far, far_time = results[large, recompute]
        more += round((micro - small) / (large - small) * (far.peak - used.peak))
        a = (times.total - far_time.total) / (1 / small - 1 / large)
        seconds -= a * (1 / small - 1 / micro)
    return more, seconds / base_time.total


def _name(ep: int, mode: str) -> str:
    return f"parallel.ep={ep} parallel.mode={mode}"


def _too_large(size: float, usable: float, what: str = "needs") -> str:
    return f"{what} {size / 1e9:,.1f} GB of {usable / 1e9:,.1f}"


def make_plan(
    config: Config,
    world: int,
    cluster: Cluster,
    sigma: float = 0.0,
    num_outputs: int | None = None,
    ep_sizes: list[int] | None = None,
) -> tuple[Plan, str]:
    """Plan `config` on `world` ranks; return the plan and its precision. Raises ConfigError."""
    task = task_of(config, num_outputs)
    with torch.device("meta"):
        model = task.build_model(config.parallel.virtual_ranks)
    flops = 3 * model.flops_per_token(task.targets_per_sample)
    experts = sum(sum(layer.weights_of_experts) for layer in model.moe_layers())
    parameters = (model.num_parameters().total - experts, experts)
    precision = precision_on(config, cluster)
    source = f"log-normal with sigma {sigma:g}" if sigma else "balanced"
    moe = config.moe
    load = Load(moe.num_experts, moe.top_k, moe.capacity.factor, sigma, source)
    search = Search(config, world, cluster, precision, load, task.num_outputs, parameters)
    try:
        found = plan(search, flops, task.targets_per_sample, ep_sizes)
    finally:
        search.close()
    return found, precision


def precision_on(config: Config, cluster: Cluster) -> str:
    """Resolve `auto` on the cluster: bf16 on its GPUs, on a CPU as a run here would."""
    if config.train.precision != "auto":
        return config.train.precision
    if cluster.device == "cuda":
        return "bf16"
    return resolve_precision("auto", torch.device("cpu"), config.model.dim)
