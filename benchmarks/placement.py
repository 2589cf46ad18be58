"""The gain of moving experts on recorded routing, and the time of a plan of moves or of copies.

    dmoe train moe.num_experts=32 moe.top_k=4 train.steps=400 train.log_every=1 train.run_dir=RUN
    python benchmarks/placement.py RUN --ranks 8
    python benchmarks/placement.py

With a run: rows of the busiest of the ranks over their mean, as its recorded loads would give it;
mean over steps and layers, from the 11th step on. Without one: the times of the two planners.

Letters: E experts, L MoE layers.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from dmoe import read_metrics
from dmoe.moe.copy_planner import CopyRule, plan_copies
from dmoe.moe.placement import ExpertPlacement, contiguous_placement
from dmoe.moe.placement_plan import max_over_mean, plan_placement

FIRST = 10
"""Steps that are left out: the router has only begun to learn."""
Load = list[float]


def loads_by_layer(run: str) -> list[list[Load]]:
    """Return the load [E] of each logged step, by layer."""
    lines = [line for line in read_metrics(run) if line["event"] == "train"]
    steps = [[layer["load"] for layer in line["layers"]] for line in lines]
    return [list(layer) for layer in zip(*steps, strict=True)]


def replay(loads: Sequence[Load], ranks: int, every: int, source: str) -> tuple[float, float]:
    """Return the mean imbalance, and the experts that move per step, of one layer.

    Args:
        loads: of each step.
        ranks: of the EP group.
        every: steps between two moves; 0: never.
        source: `ema` or `last`.
    """
    placement, expected = contiguous_placement(len(loads[0]), ranks), list(loads[0])
    seen, moves = [], 0
    for step, load in enumerate(loads):
        if step >= FIRST:
            seen.append(max_over_mean(load, placement))
        share = 1.0 if source == "last" else 1 / max(1, every)
        expected = [mean + (rows - mean) * share for mean, rows in zip(expected, load, strict=True)]
        if every and (step + 1) % every == 0:
            new = plan_placement(expected, placement)
            moves += count_moves(placement, new)
            placement = new
    return statistics.fmean(seen), moves / len(loads)


def count_moves(old: ExpertPlacement, new: ExpertPlacement) -> int:
    """Count the experts whose rank differs."""
    return sum(old.rank_of[expert] != new.rank_of[expert] for expert in old.rank_of)


def placement_milliseconds(experts: int, ranks: int, host: int, plans: int) -> list[float]:
    """Return the time of plans of moves for log-normal loads (sigma 0.5), each the best of five."""
    draw = random.Random(0)
    start, hosts = contiguous_placement(experts, ranks), [rank // host for rank in range(ranks)]
    loads = [[draw.lognormvariate(5, 0.5) for _ in range(experts)] for _ in range(plans)]
    return [_milliseconds(partial(plan_placement, load, start, hosts)) for load in loads]


def copies_milliseconds(experts: int, ranks: int, plans: int) -> list[float]:
    """Return the time of plans of two copies per rank, divided rows included, for such loads."""
    draw, rule = np.random.default_rng(0), CopyRule(2)
    counts = draw.poisson(draw.lognormal(4, 0.5, (plans, 1, experts)), (plans, ranks, experts))
    return [_milliseconds(lambda count=count: plan_copies(count, rule).rows_PI) for count in counts]


def _milliseconds(call: Callable[[], object]) -> float:
    """Return the time of a call, the best of five."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def summary(times: Sequence[float]) -> str:
    """Format times in milliseconds."""
    return f"median {statistics.median(times):.2f} ms, largest {max(times):.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", help="run directory with log_every=1")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the EP group")
    given = parser.parse_args()
    if given.run is None:
        for experts, ranks, host in ((256, 64, 8), (256, 64, 64), (256, 8, 8), (64, 8, 8)):
            times = placement_milliseconds(experts, ranks, host, 100)
            print(f"moves, E={experts}, {ranks} ranks, {host} per host: {summary(times)}")
        for experts, ranks in ((256, 64), (64, 8)):
            times = copies_milliseconds(experts, ranks, 100)
            print(f"copies, E={experts}, {ranks} ranks: {summary(times)}")
        return
    layers = loads_by_layer(given.run)
    for every, source in ((0, "fixed"), (1, "last"), (10, "last"), (10, "ema"), (100, "ema")):
        pairs = [replay(loads, given.ranks, every, source) for loads in layers]
        imbalance, moves = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        name = "fixed" if not every else f"every {every}, from {source}"
        print(f"{name}: {imbalance:.3f}, {moves:.2f} experts per step and layer")


if __name__ == "__main__":
    main()
