"""The best layouts of a config on a cluster, why, and why the others fail.

A layout is what may change without changing the model: EP, data-parallel mode, micro-batch,
recomputation. The search runs each (EP, mode) once, at the smallest micro-batch, and learns from
three further runs what a larger micro-batch and recomputation add; the best are then run exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from dmoe.config.errors import ConfigError
from dmoe.config.rules import check
from dmoe.config.rules.parallel import check_world
from dmoe.config.schema import Config, RouterConfig
from dmoe.simulation.cluster import Cluster, usable_memory
from dmoe.simulation.decision import Plan, options, with_best_exchange
from dmoe.simulation.dry_run import block_kinds
from dmoe.simulation.load import make_load
from dmoe.simulation.search import (
    WORKERS,
    Estimate,
    Layout,
    Measured,
    Search,
    ep_sizes_of,
    exchanges,
    given_layout,
    micro_batches,
)
from dmoe.simulation.trace import Trace
from dmoe.train.engine import offloads, resolve_precision
from dmoe.train.tasks import task_of

SHOWN = 3
NEAR = 1.1
"""A layout is run although it may need this much more than there is: the bound is not tight."""


def plan(
    search: Search,
    flops_per_token: float,
    tokens_per_sample: int,
    ep_sizes: list[int] | None,
    factors: list[float | None],
) -> Plan:
    """Search the layouts of a config, and judge what pays beside the best (`decision.py`).

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
    mine = []
    if isinstance(given, Estimate) and (ep_sizes is None or given.layout.ep in ep_sizes):
        mine = [given]
    if not (found or mine):
        tried, fix = ",".join(map(str, ep_sizes or [])), "leave it out"
        raise ConfigError("--ep", tried, f"leaves no layout: {failed[0][1]}", fix)
    best, beyond = _exact_best(search, found, usable)
    # the config's own layout may have a micro-batch or recomputation that is not searched
    every = {e.layout: e for e in [*best, *(e for e in mine if e.fits)]}
    best = sorted(every.values(), key=lambda e: e.time.total)[:SHOWN]
    nearest = None if best else search.nearest([*found, *mine], usable)
    if nearest is not None and nearest.fits:  # what was composed had promised more than it needs
        best, nearest = [nearest], None
    failed += _why_not(found, best, beyond, usable)
    failed += [(layout.fields(), _too_large(size, usable)) for layout, size in beyond.items()]
    best = with_best_exchange(search, best, usable)
    best[:1] = [search.with_choices(search.with_extremes(e)) for e in best[:1]]
    changes = options(search, best[0], usable, factors) if best else []
    fitting = [*best, *(e for e in found if e.fits and e.layout not in beyond)]
    tokens = config.train.global_batch * tokens_per_sample
    return Plan(
        world, cluster, usable, given, best, fitting, failed, nearest, changes, search.load, tokens,
        flops_per_token, search.num_outputs,
    )  # fmt: skip


def _why_not(
    found: list[Estimate], best: list[Estimate], beyond: dict[Layout, int], usable: float
) -> Iterator[tuple[str, str]]:
    """Say of each EP size and mode that is not among the best why it is not."""
    for ep, mode in dict.fromkeys((e.layout.ep, e.layout.mode) for e in found):
        same = [e for e in found if (e.layout.ep, e.layout.mode) == (ep, mode)]
        least = min(max(e.memory.peak, beyond.get(e.layout, 0)) for e in same)
        fit = [e.time.total for e in same if e.fits and e.layout not in beyond]
        if least > usable:
            yield _name(ep, mode), _too_large(least, usable, "needs at least")
        elif fit and best and (ep, mode) not in {(e.layout.ep, e.layout.mode) for e in best}:
            longer = max(0.0, min(fit) / min(e.time.total for e in best) - 1)
            yield _name(ep, mode), f"fits, and takes about {longer:.0%} longer"


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
        requests = [request for layout in chosen for request in search.requests(layout)]
        if sum(request not in search.seen for request in set(requests)) == 1:
            # a worker would wait, and this is asked of the best layout later
            requests.append((chosen[0], search.load.worst(chosen[0].ep)))
        search.run(*requests)
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
        micros = [n for n in micro_batches(config, world) if search.load.answers(n)] or [1]
        modes = ["ddp", "fsdp"] if world > 1 else [config.parallel.mode]
        first = _first(search, sizes, modes, micros[0])
        load, mean = (of(*first.shape) for of in (search.load.p99, search.load.mean_max))
        ends = (micros[0], next((n for n in micros if n > micros[0]), micros[0]))
        corners = [(micro, recompute) for micro in ends for recompute in ("block", "none")]
        at_corners = [(_at(first, *corner), load) for corner in corners]
        *measured, usual = search.run(*at_corners, (first, mean))
        results = dict(zip(corners, measured, strict=True))
        slowest = results[corners[0]]
        per_load = (slowest.time.total - usual.time.total) / max(1e-9, load - mean)
    except ConfigError as error:
        failed.append(("every layout", str(error)))
        return
    small, beyond = list[Layout](), list[tuple[float, Layout]]()
    for ep, mode in product(reversed(sizes), modes):
        layout = first._replace(ep=ep, mode=mode)
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
    # that of the config beside them, so that no worker waits
    new = [(layout, search.load.p99(*layout.shape)) for layout in small]
    search.run(*new, *search.requests_of_given())
    for layout in small:
        load = search.load.p99(*layout.shape)
        used, times, _ = search.run((layout, load))[0]
        less = per_load * (load - search.load.mean_max(*layout.shape)) / times.total
        for micro, recompute in product(dict.fromkeys(micros), ("none", "block")):
            more, slower = _delta(results, ends, micro, recompute)
            expected = replace(used, peak=used.peak + more)
            yield Estimate(
                _at(layout, micro, recompute),
                share // micro,
                expected,
                times.scaled(slower * (1 - less)),
                expected.peak <= usable,
                exact=False,
            )


def _first(search: Search, sizes: list[int], modes: Sequence[str], micro: int) -> Layout:
    """Return the layout that the others are compared with: of one node, sharded, if it can run."""
    near = max((n for n in sizes if n <= search.cluster.devices), default=sizes[0])
    mine = next(iter(exchanges(search.config)), "")
    every = [
        Layout(ep, mode, micro, "block", mine)
        for ep in sorted(sizes, key=lambda n: n != near)
        for mode in reversed(modes)
    ]
    return next(filter(search.allows, every), every[0])


def _at(layout: Layout, micro_batch: int, recompute: str) -> Layout:
    return layout._replace(micro_batch=micro_batch, recompute=recompute)


def _delta(
    results: dict[tuple[int, str], Measured],
    ends: tuple[int, int],
    micro: int,
    recompute: str,
) -> tuple[int, float]:
    """Return what micro-batch and recomputation change: bytes, and a factor of the time.

    The time of a step is a / micro + b: a micro-batch has a fixed cost.
    """
    small, large = ends
    base, base_time, _ = results[small, "block"]
    used, times, _ = results[small, recompute]
    more, seconds = used.peak - base.peak, times.total
    if micro > small:
        far, far_time, _ = results[large, recompute]
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
    choices: Trace | RouterConfig | None = None,
    factors: list[float | None] | None = None,
) -> tuple[Plan, str]:
    """Plan `config` on `world` ranks; return the plan and its precision. Raises ConfigError.

    `sigma` or `choices` say how unequal the load is: see `load.make_load`. `factors`: capacities
    to compare at the best layout.
    """
    check_world(world)
    offloads(config, torch.device(cluster.device))  # refused on a CPU, as a run there is
    task = task_of(config, num_outputs)
    with torch.device("meta"):
        model = task.build_model(config.parallel.virtual_ranks)
    flops = 3 * model.flops_per_token(task.targets_per_sample)
    experts = sum(sum(layer.weights_of_experts) for layer in model.moe_layers())
    parameters = (model.num_parameters().total - experts, experts)
    kinds = block_kinds(config, model=model)
    precision = precision_on(config, cluster)
    if isinstance(choices, RouterConfig) and config.moe.router.kind != "workload":
        # so that a hot rank is a rank
        choices = replace(choices, ranks=max(2, *(ep_sizes or ep_sizes_of(config, world, cluster))))
    load = make_load(config, world, sigma, choices)
    search = Search(config, world, cluster, precision, load, task.num_outputs, parameters, kinds)
    try:
        found = plan(search, flops, task.targets_per_sample, ep_sizes, factors or [])
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
