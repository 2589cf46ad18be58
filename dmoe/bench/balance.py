"""The workloads W0 to W7 under each way to balance ranks: imbalance, rows, bytes and time.

Settings, one row of the table for each workload, EP size and setting:
  fixed       every rank keeps its run of experts
  periodic    experts are placed anew after every step, by the load of the last one
  copies 1    copies for the step, one slot per rank; copies 2: two
  oracle      a lower bound for two copies per rank (`simulation.oracle.bound_with_copies`)

The router makes the load (`moe/routers/workload.py`), the planners of a run divide it, without
processes; columns are means over the steps, `worst` is the largest. `sent_mb`: bytes that a rank
sends in a layer's forward and backward, on average, by the plan. `ms`: one layer, forward and
backward, on real ranks with one thread each, the slowest of a round, all settings interleaved; only
where each rank has a core of its own.

Letters: P ranks, E experts, D width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import fmean
from typing import Any, Literal, get_args

import numpy as np
import torch

from dmoe.bench.layer import DTYPES, Shape
from dmoe.bench.measure import Times, interleave, machine, quartiles
from dmoe.config.expert_shapes import multiply_adds
from dmoe.config.rules.workload import check_workload
from dmoe.config.schema import RouterConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.local_ranks import run_ranks
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.copy_planner import CopyPlan, CopyRule, Counts, plan_copies
from dmoe.moe.layer import MoE
from dmoe.moe.placement import contiguous_placement
from dmoe.moe.placement_plan import plan_placement
from dmoe.moe.routers import build_router
from dmoe.moe.routing import BatchShape, TokenContext, count_per_expert
from dmoe.simulation.oracle import bound_with_copies, max_over_mean

Workload = Literal["W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7"]
WORKLOADS: tuple[Workload, ...] = get_args(Workload)
SLOTS = (1, 2)
TIMED = {"fixed": 0, "copies 2": 2}
TIMED_STEP = 3
"""A step in which W7 bursts."""
ROW_TRIPS, WEIGHT_TRIPS = 4, 2
"""All-to-alls of a row and of a copied expert, forward and backward together."""


def run(
    shape: Shape | None = None,
    *,
    ranks: Sequence[int] = (2, 4, 8),
    workloads: Sequence[Workload] = WORKLOADS,
    hot: float = 1.6,
    steps: int = 10,
    dtype: str = "fp32",
    rounds: int = 7,
) -> dict[str, Any]:
    """Compare the settings on every workload and EP size.

    Args:
        shape: sizes of the layer; its tokens are those of all ranks.
        ranks: EP sizes; each divides tokens and experts.
        workloads: of `router.workload`.
        hot: rows of a hot expert over the mean.
        steps: steps that are counted.
        dtype: a key of `layer.DTYPES`.
        rounds: rounds of the clock; 0: no time.
    """
    shape, rows = shape or Shape(), list[dict[str, Any]]()
    check_workloads(shape, ranks, hot, workloads)
    for size in ranks:
        times: Times = {}
        if rounds and size <= len(os.sched_getaffinity(0)):
            found = run_ranks(size, _time, shape, workloads, hot, dtype, rounds, timeout=600.0)
            times = {name: [max(t) for t in zip(*(f[name] for f in found), strict=True)]
                     for name in found[0]}  # fmt: skip
        for workload in workloads:
            plans = _plans(shape, workload, size, hot, steps)
            for setting, loads in plans.items():
                row = {"name": f"EP {size} {workload} {setting}"} | _columns(loads, shape, dtype)
                if taken := times.get(f"{workload} {setting}"):
                    row["ms_q1"], row["ms"], row["ms_q3"] = quartiles(taken)
                    fixed = times[f"{workload} fixed"]
                    row["faster"] = quartiles([a / b for a, b in zip(fixed, taken, strict=True)])[1]
                rows.append(row)
    return {
        "machine": machine() | {"threads": 1},
        "shape": asdict(shape) | {"dtype": dtype, "hot": hot, "steps": steps},
        "rows": rows,
    }


def check_workloads(
    shape: Shape, ranks: Sequence[int], hot: float, workloads: Sequence[Workload] = WORKLOADS
) -> None:
    """Refuse a workload that one of the EP sizes cannot have, before any is measured."""
    for size, workload in product(ranks, workloads):
        check_workload(_router(workload, size, hot), shape.experts, shape.top_k)


def workload_counts(shape: Shape, workload: Workload, ranks: int, hot: float, step: int) -> Counts:
    """Count the rows of each rank for each expert in a step, int64 [P, E]."""
    router = build_router(_router(workload, ranks, hot), 1, shape.experts, shape.top_k, 0)
    context = TokenContext(noise_key=(0, step))
    routing = router(torch.zeros(shape.tokens, 1), context, BatchShape(ranks, ranks))
    selected_TK = routing.is_selected_TK
    counts: Counts = count_per_expert(routing.expert_TK, selected_TK, ranks, shape.experts).numpy()
    return counts


def _router(workload: Workload, ranks: int, hot: float) -> RouterConfig:
    return RouterConfig(kind="workload", workload=workload, ranks=ranks, hot=hot)


Loads = list[tuple[Counts, float, float, int]]
"""Of each step: rows of each rank, max/mean, rows that a rank sends on average, copies."""


def _plans(
    shape: Shape, workload: Workload, ranks: int, hot: float, steps: int
) -> dict[str, Loads]:
    """Divide the rows of each step by each setting."""
    found: dict[str, Loads] = {}
    placement = contiguous_placement(shape.experts, ranks)
    for step in range(steps):
        count_PE = workload_counts(shape, workload, ranks, hot, step)
        load_E = count_PE.sum(0).tolist()
        order = [expert for own in placement.experts for expert in own]
        plans = {
            "fixed": CopyPlan(count_PE, ()),
            "periodic": CopyPlan(count_PE[:, order], ()),
            **{f"copies {n}": plan_copies(count_PE, CopyRule(n)) for n in SLOTS},
        }
        for setting, plan in plans.items():
            found.setdefault(setting, []).append(_load(plan))
        bound = bound_with_copies(load_E, ranks, SLOTS[-1])
        found.setdefault("oracle", []).append((np.zeros(0, np.int64), bound, 0.0, 0))
        placement = plan_placement(load_E, placement)
    return found


def _load(plan: CopyPlan) -> tuple[Counts, float, float, int]:
    rows_P = plan.rows_of_ranks
    own = np.repeat(np.arange(plan.ranks), np.diff(plan.edge_P))
    stays = sum(int(plan.rows_PI[rank, own == rank].sum()) for rank in range(plan.ranks))
    sent = (int(rows_P.sum()) - stays) / plan.ranks
    return rows_P, max_over_mean(rows_P.tolist()), sent, len(plan.moves)


def _columns(loads: Loads, shape: Shape, dtype: str) -> dict[str, Any]:
    """Return the numbers of one setting: means over its steps."""
    imbalance = [found[1] for found in loads]
    row: dict[str, Any] = {"max_over_mean": fmean(imbalance), "worst": max(imbalance)}
    if not len(loads[0][0]):
        return row
    ranks, itemsize = len(loads[0][0]), DTYPES[dtype].itemsize
    copies = fmean(found[3] for found in loads)
    weights = multiply_adds([shape.hidden], shape.dim, shape.dim, "swiglu")
    moved = ROW_TRIPS * shape.dim * fmean(found[2] for found in loads)
    copied = WEIGHT_TRIPS * weights * copies / ranks
    return row | {
        "rows": fmean(float(found[0].max()) for found in loads),
        "copies": copies,
        "sent_mb": (moved + copied) * itemsize / 1e6,
    }


def _time(
    rank: int,
    world: int,
    shape: Shape,
    workloads: Sequence[Workload],
    hot: float,
    dtype: str,
    rounds: int,
) -> Times:
    """Time the layer on one rank, by workload and setting."""
    mesh, own = build_mesh(world, torch.device("cpu")), shape.tokens // world
    generator = torch.Generator().manual_seed(rank)
    x, grad = (
        torch.randn(1, own, shape.dim, generator=generator).to(DTYPES[dtype]) for _ in range(2)
    )
    x.requires_grad_()
    context = TokenContext(noise_key=(0, TIMED_STEP), first_sequence=rank)
    layers = {}
    for name, slots in TIMED.items():
        router = _router(workloads[0], world, hot)
        layer = MoE(shape.dim, shape.hidden, shape.experts, shape.top_k, router=router)
        layer.to(DTYPES[dtype])
        shard_experts(layer, mesh, copies=CopyRule.of(slots))
        layers[name] = layer

    def step(layer: MoE, workload: Workload) -> None:
        layer.router.config = replace(layer.router.config, workload=workload)
        layer(x, context).y.backward(grad)

    runs = {
        f"{workload} {name}": lambda layer=layer, workload=workload: step(layer, workload)
        for workload in workloads
        for name, layer in layers.items()
    }
    number = torch.ones(1)
    comm = next(iter(layers.values())).comm
    return interleave(runs, rounds, barrier=lambda: comm.sum(number))
