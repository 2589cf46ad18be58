"""`dmoe plan --calibrate`: a cluster file for the CPUs of this machine, from a minute of measuring.

1. Some small models are trained by as many independent processes at a time as cores are shared by
   ranks: every kernel of a step where it runs, and what a step takes beyond them per kernel.
2. Matrix products on a grid of shapes; collectives by size.
3. The same models are trained on real gloo ranks. What a step takes beyond its kernels and
   collectives is the wait at each collective. Each of them is then predicted from tables without
   its own kernels: the residuals, of which the interval of a plan is made.

Letters: W ranks.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.link_speed import time_collectives
from dmoe.distributed.local_ranks import run_ranks
from dmoe.simulation.calibration.timed_step import TimedStep, time_products, time_steps
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.dry_run import DryRun, dry_run
from dmoe.simulation.measured import OTHER, Curve, Measured, Products, name_of, size_of
from dmoe.simulation.memory import totals
from dmoe.simulation.step_time import step_time
from dmoe.train.engine import resolve_precision

VOCABULARY = 256
BASE = (
    *("data.source=synthetic:zipf", "train.device=cpu", "model.layers=2", "model.heads=4"),
    *("train.eval_sequences=8", "moe.top_k=2"),
)
MODELS = (
    "model.dim=96 moe.num_experts=4 moe.expert_dim=128 data.seq_len=64 train.global_batch=16"
    " train.precision=fp32",
    "model.dim=256 moe.num_experts=8 moe.expert_dim=384 data.seq_len=192 train.global_batch=8"
    " moe.exchange=padded moe.capacity.factor=1.25 train.precision=fp32",
    "model.dim=160 model.layers=3 moe.num_experts=16 moe.expert_dim=96 data.seq_len=96"
    " train.global_batch=16 moe.top_k=4 moe.experts.shared=1 train.precision=fp32",
    "model.dim=512 model.heads=8 moe.num_experts=4 moe.expert_dim=768 data.seq_len=128"
    " train.global_batch=8 train.precision=bf16 moe.router.kind=workload",
    "model.dim=384 model.heads=6 moe.num_experts=8 moe.expert_dim=256 data.seq_len=96"
    " train.global_batch=8 train.micro_batch=1 train.precision=bf16 moe.router.kind=workload",
)
"""The last two have a forced router: each number of rows that is new costs oneDNN a compilation.
They differ in the rows of a kernel, so bfloat16 is known at two sizes."""
BALANCED = "moe.router.kind=workload"
"""On ranks the router is balanced by force: an uneven one is no property of the machine."""


class Effort(NamedTuple):
    """How much is measured."""

    models: Sequence[str] = MODELS
    seconds: float = 0.5
    """Time of the steps of one model, about."""
    plays: int = 3
    """Steps whose kernels are timed one by one."""
    sizes: tuple[tuple[int, ...], ...] = (
        (16, 64, 256, 1024),
        (16, 64, 256, 1024),
        (16, 64, 256, 1024),
    )
    """Rows, inner widths and columns of matrix products."""
    product_seconds: float = 0.0015
    sent: tuple[int, ...] = (16, 4096, 65536, 1 << 20, 4 << 20)
    """Bytes of collectives."""
    calls: int = 11


@dataclass(frozen=True)
class Calibration:
    """Everything that was measured."""

    tables: list[Measured]
    residuals: list[float]
    flops: dict[str, float]
    """FLOP/s of one core, by dtype: the fastest product."""
    bandwidth: float
    """Bytes per second of one core."""
    resident: float
    """Bytes of a rank that are no tensor."""


def calibrate(
    worlds: list[int], effort: Effort, say: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Measure this machine's CPUs.

    Args:
        worlds: numbers of ranks, e.g. 1, 2 and 4.
        effort: how much is measured.
        say: told what begins.
    """
    cores = len(os.sched_getaffinity(0))
    native = resolve_precision("auto", torch.device("cpu"), 1 << 20) == "bf16"
    models = [m.split() for m in effort.models if native or "bf16" not in m]
    configs = [load(None, [*BASE, *model]) for model in models]
    balanced = [load(None, [*BASE, *model, BALANCED]) for model in models]
    dtypes = ["float32", *(["bfloat16"] if native else [])]
    apart = dict[int, list[TimedStep]]()
    parts = dict[int, Measured]()
    for count in sorted({min(world, cores) for world in worlds} | {1}):
        threads = cores // count
        say(f"kernels and products of {count} at a time, {threads} threads each")
        apart[count] = [_independent(count, threads, config, effort) for config in configs]
        products = _products(count, threads, dtypes, effort)
        parts[count] = Measured(count, threads, 0.0, 0.0, products, {}, {})
    taken = dict[int, list[float]]()
    links = dict[int, Measured]()
    for world in sorted(set(worlds) - {1}):
        say(f"collectives and steps of {world} ranks")
        found = run_ranks(world, time_collectives, list(effort.sent), effort.calls)
        links[world] = Measured(world, max(1, cores // world), 0.0, 0.0, {}, {}, found[0])
        taken[world] = [
            statistics.median(
                run_ranks(world, time_steps, config, VOCABULARY, 1, effort.seconds, 0)[0].seconds
            )
            for config in balanced
        ]
    runs = {world: [_dry(config, world) for config in balanced] for world in taken}
    runs[1] = [_dry(config, 1) for config in configs]
    taken[1] = [statistics.median(step.seconds) for step in apart[1]]
    tables = _tables(parts, links, apart, runs, taken, range(len(configs)))
    residuals = []
    for left_out in range(len(configs)):
        others = [i for i in range(len(configs)) if i != left_out] or [left_out]
        without = _tables(parts, links, apart, runs, taken, others)
        residuals += [
            times[left_out] / predicted(runs[world][left_out], without) - 1
            for world, times in taken.items()
        ]
    core = parts[max(parts)]
    flops = {
        dtype: 2 / min(s / n for s, n in zip(p.seconds, map(math.prod, _grid(p)), strict=True))
        for dtype, p in core.products.items()
    }
    size, seconds = tables[0].kernels["mul float32"][-1]
    resident = min(step.resident for step in apart[1])
    return Calibration(tables, residuals, flops, size / seconds, resident)


def _grid(products: Products) -> list[tuple[float, float, float]]:
    rows, inner, columns = products.sizes
    return [(a, b, c) for a in rows for b in inner for c in columns]


def _independent(count: int, threads: int, config: Config, effort: Effort) -> TimedStep:
    """Train `config` in `count` processes at a time that know nothing of each other."""
    arguments = (config, VOCABULARY, threads, effort.seconds, effort.plays)
    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(run_ranks, 1, time_steps, *arguments) for _ in range(count)]
        every: list[TimedStep] = [job.result()[0] for job in jobs]
    return every[0]


def _products(count: int, threads: int, dtypes: list[str], effort: Effort) -> dict[str, Products]:
    sizes = [list(axis) for axis in effort.sizes]
    arguments = (dtypes, sizes, threads, effort.product_seconds)
    found = run_ranks(count, time_products, *arguments)[0]
    axes = [[float(n) for n in axis] for axis in sizes]
    return {dtype: Products(axes, seconds) for dtype, seconds in found.items()}


def _dry(config: Config, world: int) -> DryRun:
    precision = config.train.precision
    return dry_run(config, world, precision, cuda=False, num_outputs=VOCABULARY)


def _tables(
    parts: dict[int, Measured],
    links: dict[int, Measured],
    apart: dict[int, list[TimedStep]],
    runs: dict[int, list[DryRun]],
    taken: dict[int, list[float]],
    chosen: Sequence[int],
) -> list[Measured]:
    """Make the tables from the models of `chosen` alone."""
    tables = []
    for count, part in parts.items():
        steps = [apart[count][i] for i in chosen]
        tables.append(replace(part, kernels=curves(steps), host_seconds=_host_seconds(steps)))
    for world, link in links.items():
        without = [*tables, link]
        waits = []
        for i in chosen:
            calls = sum(totals(runs[world][i])[1].values())
            waits.append((taken[world][i] - predicted(runs[world][i], without)) / calls)
        tables.append(replace(link, wait_seconds=max(0.0, statistics.median(waits))))
    return _merged(tables)


def _merged(tables: list[Measured]) -> list[Measured]:
    """Join the kernels and the collectives of the same number of ranks."""
    found = dict[int, Measured]()
    for table in tables:
        if (same := found.get(table.ranks)) is None:
            found[table.ranks] = table
        else:
            found[table.ranks] = replace(
                same, collectives=table.collectives, wait_seconds=table.wait_seconds
            )
    return list(found.values())


NUMBERS: dict[str, Any] = {f.name: 0 for f in fields(Cluster) if f.type in ("int", "float")}
NO_CLUSTER = Cluster("", "cpu", **NUMBERS)
"""Its measured times are replaced; no other number is read then."""


def predicted(run: DryRun, tables: list[Measured]) -> float:
    """Return the seconds of a step by these tables."""
    return step_time(run, replace(NO_CLUSTER, measured=tuple(_merged(tables))), 1).total


def _host_seconds(steps: list[TimedStep]) -> float:
    """Return the time between two kernels that the steps have and their kernels alone have not."""
    gaps = []
    for step in steps:
        kernels = sum(count * seconds for _, count, seconds in step.kernels)
        number = sum(count for _, count, _ in step.kernels)
        gaps.append((statistics.median(step.seconds) - kernels) / number)
    return max(0.0, statistics.median(gaps))


def curves(steps: Sequence[TimedStep]) -> dict[str, Curve]:
    """Return the seconds of each kind of kernel by its size: means of sizes within a factor of 2.

    Without matrix products, which have a grid.
    """
    points = defaultdict[str, defaultdict[int, list[tuple[float, float, float]]]](
        lambda: defaultdict(list)
    )
    for step in steps:
        for kernel, count, seconds in step.kernels:
            if kernel.name == "gemm" and kernel.shape[0] == 1:
                continue
            size = size_of(kernel)
            names = [name_of(kernel), *([] if kernel.flops else [OTHER])]
            for name in names:
                points[name][math.floor(math.log2(size))].append((size, seconds, max(1, count)))
    found: dict[str, Curve] = {}
    for name, bins in sorted(points.items()):
        found[name] = [
            [
                sum(size * count for size, _, count in bins[place]) / weight,
                sum(seconds * count for _, seconds, count in bins[place]) / weight,
            ]
            for place in sorted(bins)
            for weight in [sum(count for _, _, count in bins[place])]
        ]
    return found
