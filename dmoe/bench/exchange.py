"""The layer on several gloo ranks, one thread each: its exchanges, and those of other libraries.

Rows of the table, each the slowest rank of the round:
  gemms         the bare matrix products of one rank's share (`layer.floor`)
  exchange      the four all-to-alls of the rows alone, the least that any exchange by token sends
  packed        `dmoe.MoE`, dropless
  padded        the same with a capacity, fixed slots
  transformers  Mixtral's block with `AllToAllEP`, the same weights and input

Letters: N rows of one rank, D width.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch

from dmoe.bench.layer import DTYPES, Shape, difference, floor, ours
from dmoe.bench.libraries import Contender, transformers_all_to_all
from dmoe.bench.measure import Times, interleave, machine, quartiles, summary
from dmoe.config.schema import CapacityConfig, ExpertsConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.local_ranks import run_ranks
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE


def run(
    shape: Shape | None = None,
    *,
    ranks: int = 2,
    dtype: str = "fp32",
    rounds: int = 11,
    capacity: float | None = 1.25,
    shared: int = 0,
) -> dict[str, Any]:
    """Compare and time the layer of `shape` on `ranks` ranks.

    Args:
        shape: sizes; its tokens are those of all ranks.
        ranks: EP size.
        dtype: a key of `layer.DTYPES`.
        rounds: rounds of the clock.
        capacity: capacity factor of the padded row; None: no such row.
        shared: shared experts; with any, no other library is timed.
    """
    shape = shape or Shape()
    results = run_ranks(ranks, _measure, shape, dtype, rounds, capacity, shared, timeout=600.0)
    times: Times = {
        name: [
            max(values) for values in zip(*(found["ms"][name] for found in results), strict=True)
        ]
        for name in results[0]["ms"]
    }
    return {
        "machine": machine() | {"ranks": ranks, "threads": 1},
        "shape": asdict(shape) | {"dtype": dtype, "capacity": capacity, "shared": shared},
        "rows": [
            row | {"sent_mb": results[0]["bytes"].get(row["name"], 0) / 1e6}
            for row in summary(times, "gemms")
        ],
        "faster_than_transformers": {
            f"{name}, {own}": quartiles(
                [b / a for a, b in zip(times[own], times[name], strict=True)]
            )
            for own in ("packed", "padded")
            for name in times
            if own in times and name.startswith("transformers")
        },
        "difference": results[0]["difference"],
        "ms": times,
    }


def _measure(
    rank: int,
    world: int,
    shape: Shape,
    dtype_name: str,
    rounds: int,
    capacity: float | None,
    shared: int,
) -> dict[str, Any]:
    """Measure on one rank."""
    dtype = DTYPES[dtype_name]
    mesh = build_mesh(world, torch.device("cpu"))
    own = replace(shape, tokens=shape.tokens // world)
    generator = torch.Generator().manual_seed(rank)
    x, grad = (torch.randn(1, own.tokens, own.dim, generator=generator).to(dtype) for _ in range(2))
    layers = {"packed": _layer(shape, dtype, None, shared)}
    if capacity is not None:
        layers["padded"] = _layer(shape, dtype, capacity, shared)
    for layer in layers.values():
        shard_experts(layer, mesh)
    found: dict[str, Contender] = {"gemms": floor(own, dtype, "cpu")}
    found |= {name: ours(layer, x, grad) for name, layer in layers.items()}
    packed = layers["packed"]
    exchange = packed.packed.expert_group  # type: ignore[attr-defined]
    differences = {}
    if not shared:
        try:
            found["transformers"] = transformers_all_to_all(packed, x, grad, exchange.group, world)
        except ImportError:
            pass
        else:
            theirs = found["transformers"].results()
            mine = found["packed"].results()
            differences = difference({name: mine[name] for name in theirs}, theirs, dtype_name)
    sent = {}
    for name, layer in layers.items():
        timer = (layer.padded or layer.packed).expert_group.timer  # type: ignore[attr-defined]
        timer.start(time.perf_counter)
        found[name].run()
        timer.stop()
        sent[name] = timer.sent_bytes
    rows_ND = torch.zeros(own.tokens * own.top_k, own.dim, dtype=dtype)

    def move_rows() -> None:
        for _ in range(4):
            exchange.all_to_all(rows_ND, None, None, "bench")

    runs: dict[str, Any] = {name: contender.run for name, contender in found.items()}
    runs["exchange"] = move_rows
    number = torch.ones(1)
    times = interleave(runs, rounds, barrier=lambda: packed.comm.sum(number))
    return {"ms": times, "bytes": sent, "difference": differences}


def _layer(shape: Shape, dtype: torch.dtype, capacity: float | None, shared: int) -> MoE:
    return MoE(
        shape.dim,
        shape.hidden,
        shape.experts,
        shape.top_k,
        capacity=CapacityConfig(factor=capacity),
        exchange="packed" if capacity is None else "padded",
        experts=ExpertsConfig(shared=shared),
    ).to(dtype)
