"""A run of W ranks in one process: their routing, capacity and drops, exactly.

`parallel.virtual_ranks=W` makes one process take the micro-batches of all W ranks at a time, with a
capacity group and a loss unit for each (docs/semantics.md), so choices, drops and losses are those
of W processes. Their traffic follows from the trace of the run: what each rank would have sent to
each, and the rows that its experts would have computed.

`routing_only` leaves the network out: the routers of the config, as they are initialized, choose
for tokens of independent normal numbers (drawn by seed, step and sequence), so that a thousand
ranks take seconds. With `moe.router.kind=workload` the tokens do not matter.

RUN/simulation.jsonl has one line per step, accumulation step and layer (docs/simulation.md).

Letters: W ranks, n sequences per rank, S positions, D width, L MoE layers, A accumulation steps.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import count_choices, count_zero_cost
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import batching, check, moe_blocks
from dmoe.config.schema import Config, PlacementConfig
from dmoe.moe.rng import generator
from dmoe.moe.routers import build_router
from dmoe.moe.routing import BatchShape, TokenContext
from dmoe.replay.part import ChoiceSpec
from dmoe.replay.writer import ChoiceWriter
from dmoe.simulation.drops import check_capacity
from dmoe.simulation.replay import Setting, StepTraffic, copy_rule, replay_steps
from dmoe.simulation.selection import set_expert_costs, with_next_choices
from dmoe.simulation.trace import FOLDER, Trace, first_placement, open_trace
from dmoe.train.run import train_run

LINES = "simulation.jsonl"
MAX_MATRIX = 64
"""Ranks up to which a line holds the traffic matrix; above, sums by source and by destination."""
SEQUENCES = 256
"""Sequences that are routed at a time without a network."""


def virtual(config: Config, ranks: int) -> Config:
    """Return the config of one process that holds `ranks` ranks, and records their choices.

    Raises:
        ConfigError: it has ranks already, or they do not divide the batch.
    """
    if config.parallel.virtual_ranks != 1:
        allowed = "is set by --ranks"
        raise ConfigError(
            "parallel.virtual_ranks", config.parallel.virtual_ranks, allowed, "leave it out"
        )
    trace: Any = "scores" if config.moe.capacity.overflow == "next_choice" else "choices"
    made = replace(
        config,
        parallel=replace(config.parallel, virtual_ranks=ranks, ep=1, placement=PlacementConfig()),
        tracking=replace(config.tracking, trace=trace),
    )
    check(made)
    return made


def setting_of(config: Config, ranks: int, ep: int) -> Setting:
    """Return what the ranks of a run of `config` would do; `config` as given.

    Raises:
        ConfigError: a capacity or placement that a trace does not answer.
    """
    micro_batch = batching(config, ranks).micro_batch
    placement = config.parallel.placement
    check_capacity(config.moe.capacity, has_scores=True, has_next=True)
    copy_rule(placement)
    owned = first_placement(config, ep)
    return Setting(ranks, ep, micro_batch, config.moe.capacity, placement, owned)


def simulate(config: Config, text: str, ranks: int, ep: int, quiet: bool = False) -> Path:
    """Train as `ranks` ranks would, in this process; return the run directory.

    Args:
        config: of the run, as for `dmoe train`.
        text: its text, for the run directory.
        ranks: W.
        ep: EP; divides W and the experts.
        quiet: print less.

    Raises:
        DmoeError: what `dmoe train` refuses, and numbers that do not divide.
    """
    check_ep(config, ranks, ep)
    made, setting = virtual(config, ranks), setting_of(config, ranks, ep)
    run = train_run(made, text, quiet).path
    write_lines(run, with_next_choices(open_trace(run), made), setting, made)
    return run


def check_ep(config: Config, ranks: int, ep: int) -> None:
    """Refuse an EP that does not divide the ranks and the experts, before anything is trained."""
    experts = config.moe.num_experts
    if ranks % ep or experts % ep:
        allowed = f"must divide the {ranks} ranks and the {experts} experts"
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0]
        raise ConfigError("--ep", ep, allowed, f"use one of {fits}")


def route_only(config: Config, folder: Path, ranks: int, ep: int) -> dict[str, Any]:
    """Route without a network, and write trace and lines to `folder`.

    Returns:
        `seconds` and `peak_bytes` of this process.
    """
    check_ep(config, ranks, ep)
    made, setting = virtual(config, ranks), setting_of(config, ranks, ep)
    kind = made.moe.router.kind
    if needs := router_spec(kind).needs:
        allowed = f"reads {needs} of the data, and --routing-only has none"
        raise ConfigError("moe.router.kind", kind, allowed, "leave --routing-only out")
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    spec = ChoiceSpec(
        data="normal tokens",
        seed=made.train.seed,
        global_batch=made.train.global_batch,
        seq_len=made.data.seq_len,
        layers=len(moe_blocks(made)),
        experts=count_choices(made.moe),
        top_k=made.moe.top_k,
    )
    all_scores = made.tracking.trace == "scores"
    writer = ChoiceWriter(
        folder / FOLDER, spec, str(folder), 0, field="train.run_dir", all_scores=all_scores
    )
    for step in range(made.train.steps):
        expert_NLK, score_NLK = _route_step(made, spec, step)
        writer.add(step, expert_NLK, "", score_NLK)
    writer.flush()
    write_lines(folder, with_next_choices(open_trace(folder), made), setting, made)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak}


@torch.no_grad()
def _route_step(config: Config, spec: ChoiceSpec, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Return experts and scores of the tokens of a step, [N, L, K]; scores of all: [N, L, E]."""
    dim, seed = config.model.dim, config.train.seed
    routers = []
    for layer in range(spec.layers):
        router = build_router(config.moe.router, dim, spec.experts, spec.top_k, layer)
        set_expert_costs(router, config)
        router.initialize(seed, layer, config.model.init_std)
        routers.append(router.train())
    experts, scores = [], []
    for first in range(0, spec.global_batch, SEQUENCES):
        size = min(SEQUENCES, spec.global_batch - first)
        tokens = size * spec.seq_len
        x_TD = torch.empty(tokens, dim)
        for b in range(size if router_spec(config.moe.router.kind).learned else 0):
            drawn = generator(seed, "simulated tokens", step, first + b)
            rows = slice(b * spec.seq_len, (b + 1) * spec.seq_len)
            x_TD[rows] = torch.randn(spec.seq_len, dim, generator=drawn)
        context = TokenContext(noise_key=(seed, step), first_sequence=first)
        made = [router(x_TD, context, BatchShape(size)) for router in routers]
        experts.append(
            torch.stack([r.expert_TK.masked_fill(~r.is_selected_TK, -1) for r in made], 1)
        )
        all_scores = config.tracking.trace == "scores"
        found = [r.score_TE if all_scores else r.score_TE.gather(1, r.expert_TK) for r in made]
        scores.append(torch.stack(found, 1))
    return torch.cat(experts).numpy(), torch.cat(scores).float().numpy()


def write_lines(run: Path, trace: Trace, setting: Setting, config: Config) -> None:
    """Write RUN/simulation.jsonl: whole, or not at all."""
    draft = run / f".{LINES}.partial"
    with draft.open("w", encoding="utf-8") as file:
        for traffic in replay_steps(trace, setting, count_zero_cost(config.moe.experts)):
            for line in lines_of(traffic):
                file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(run / LINES)


def lines_of(traffic: StepTraffic) -> Iterator[dict[str, Any]]:
    """Yield a line per accumulation step and layer; steps count from 1 as in metrics.jsonl."""
    rows_ALW, straggler_AL = traffic.rows_ALW, traffic.straggler_AL
    accumulation, layers, ranks, ep = traffic.sent_ALWP.shape
    dropped_L = traffic.choices_L - traffic.kept_L
    for a in range(accumulation):
        for layer in range(layers):
            line: dict[str, Any] = {
                "step": traffic.step + 1,
                "accumulation": a,
                "layer": layer,
                "ranks": ranks,
                "ep": ep,
                "rows": rows_ALW[a, layer].tolist(),
                "straggler": round(float(straggler_AL[a, layer]), 6),
                "drop_rate": float(dropped_L[layer] / max(1, int(traffic.choices_L[layer]))),
            }
            if ranks <= MAX_MATRIX:
                line["traffic"] = traffic_matrix(traffic.sent_ALWP[a, layer]).tolist()
            else:
                line["sent"] = traffic.sent_ALWP[a, layer].sum(1).tolist()
            yield line


def traffic_matrix(sent_WP: np.ndarray) -> np.ndarray:
    """Return the rows from each rank to each, int64 [W, W]: 0 between rows of the mesh."""
    ranks, ep = sent_WP.shape
    matrix = np.zeros((ranks, ranks), np.int64)
    for rank in range(ranks):
        first = rank // ep * ep
        matrix[rank, first : first + ep] = sent_WP[rank]
    return matrix
