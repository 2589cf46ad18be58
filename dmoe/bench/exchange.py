"""The layer on several gloo ranks, one thread each: its exchanges, and those of other libraries.

Rows of the table, each the slowest rank of the round:
  gemms         the bare matrix products of one rank's share (`layer.floor`)
  exchange      the four all-to-alls of the rows alone, the least that any exchange by token sends
  packed        `dmoe.MoE`, dropless
  padded        the same with a capacity, fixed slots
  + overlap ... the same with an option of `parallel.exchange`, see `OPTIONS`; two levels from 4
                ranks on, as if half of them were another node
  others        the installed libraries (`libraries.py`), the same weights and input

`sent_mb`: bytes that rank 0 sends in a forward and backward; `of_least`: those of all ranks over
the least, each token once to each other rank that has one of its experts, and back, in the rows'
dtype.

Letters: N rows of one rank, D width.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch

from dmoe.bench.contender import Contender
from dmoe.bench.layer import DTYPES, Shape, difference, floor, ours
from dmoe.bench.libraries import OVER_RANKS, build_all
from dmoe.bench.measure import Times, interleave, machine, quartiles, summary
from dmoe.config.schema import CapacityConfig, ExchangeConfig, ExpertsConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.local_ranks import run_ranks
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE

OPTIONS = {
    "packed + overlap": ExchangeConfig(overlap=True),
    "packed + 2 chunks": ExchangeConfig(chunks=2),
    "packed + 4 chunks": ExchangeConfig(chunks=4),
    "packed + 2 chunks + overlap": ExchangeConfig(chunks=2, overlap=True),
    "packed + two levels": ExchangeConfig(levels=2),
    "packed + once per rank": ExchangeConfig(once_per_rank=True),
    "packed + bf16 wire": ExchangeConfig(wire="bf16"),
    "packed + once + bf16": ExchangeConfig(once_per_rank=True, wire="bf16"),
    "padded + overlap": ExchangeConfig(overlap=True),
    "padded + 2 chunks": ExchangeConfig(chunks=2),
}


def run(
    shape: Shape | None = None,
    *,
    ranks: int = 2,
    dtype: str = "fp32",
    rounds: int = 11,
    capacity: float | None = 1.25,
    shared: int = 0,
    libraries: tuple[str, ...] | None = None,
    variants: bool = True,
) -> dict[str, Any]:
    """Compare and time the layer of `shape` on `ranks` ranks.

    Args:
        shape: sizes; its tokens are those of all ranks.
        ranks: EP size.
        dtype: a key of `layer.DTYPES`.
        rounds: rounds of the clock.
        capacity: capacity factor of the padded row; None: no such row.
        shared: shared experts; with any, no other library is timed.
        libraries: keys of `OVER_RANKS`; None: all that are installed.
        variants: time the rows of `OPTIONS` too.
    """
    shape = shape or Shape()
    given = (shape, dtype, rounds, capacity, shared, libraries, variants)
    results = run_ranks(ranks, _measure, *given, timeout=600.0)
    times: Times = {
        name: [
            max(values) for values in zip(*(found["ms"][name] for found in results), strict=True)
        ]
        for name in results[0]["ms"]
    }
    return {
        "machine": machine() | {"ranks": ranks, "threads": 1},
        "shape": asdict(shape) | {"dtype": dtype, "capacity": capacity, "shared": shared},
        "rows": [row | _bytes(row["name"], results) for row in summary(times, "gemms")],
        "faster_than_without": {
            name: quartiles([a / b for a, b in zip(times[base], times[name], strict=True)])
            for name in times
            if (base := name.split(" + ")[0]) != name
        },
        "faster_than": {
            f"{name}, {own}": quartiles(
                [b / a for a, b in zip(times[own], times[name], strict=True)]
            )
            for own in ("packed", "padded")
            for name in times
            if own in times and name in OVER_RANKS
        },
        "difference": results[0]["difference"],
        "left_out": results[0]["left_out"],
        "ms": times,
    }


def _bytes(name: str, results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the columns of bytes of a row of the table; none if it has not been counted."""
    if name not in results[0]["bytes"]:
        return {}
    total = sum(found["bytes"][name] for found in results)
    least = sum(found["least"] for found in results)
    return {"sent_mb": results[0]["bytes"][name] / 1e6, "of_least": total / least}


def _measure(
    rank: int,
    world: int,
    shape: Shape,
    dtype_name: str,
    rounds: int,
    capacity: float | None,
    shared: int,
    libraries: tuple[str, ...] | None,
    variants: bool,
) -> dict[str, Any]:
    """Measure on one rank."""
    dtype = DTYPES[dtype_name]
    is_divisible = world > 2 and world % 2 == 0
    mesh = build_mesh(world, torch.device("cpu"), node_size=world // 2 if is_divisible else None)
    own = replace(shape, tokens=shape.tokens // world)
    generator = torch.Generator().manual_seed(rank)
    x, grad = (torch.randn(1, own.tokens, own.dim, generator=generator).to(dtype) for _ in range(2))
    layers = {"packed": _layer(shape, dtype, None, shared)}
    if capacity is not None:
        layers["padded"] = _layer(shape, dtype, capacity, shared)
    for name, option in (OPTIONS if variants else {}).items():
        base = name.split(" + ")[0]
        if base not in layers or (option.wire == "bf16" and dtype_name == "bf16"):
            continue
        if option.once_per_rank and shape.top_k == 1:
            continue
        if shape.experts // world % option.chunks:
            continue
        if option.levels == 2 and mesh.node_group is None:
            continue
        layers[name] = _layer(shape, dtype, capacity if base == "padded" else None, shared)
    for name, layer in layers.items():
        shard_experts(layer, mesh, exchange=OPTIONS.get(name))
    found: dict[str, Contender] = {"gemms": floor(own, dtype, "cpu")}
    found |= {name: ours(layer, x, grad) for name, layer in layers.items()}
    packed = layers["packed"]
    exchange = packed.packed.expert_group  # type: ignore[attr-defined]
    differences, left_out = {}, "all libraries: none has shared experts here"
    if not shared:
        others, left_out = build_all(
            OVER_RANKS, libraries, packed, x, grad, exchange.group, world, rank
        )
        mine = found["packed"].results()
        for name, contender in others.items():
            theirs = contender.results()
            common = {key: mine[key] for key in ("y", "x")}
            differences[name] = difference(common, theirs, dtype_name)
        found |= others
    sent = {}
    for name, layer in layers.items():
        timer = (layer.padded or layer.packed).expert_group.timer  # type: ignore[attr-defined]
        timer.start(time.perf_counter)
        found[name].run()
        timer.stop()
        sent[name] = timer.sent_bytes
    own_experts = shape.experts // world
    rank_TK = packed(x).plan.expert_TK // own_experts
    visits = sum(int((rank_TK == other).any(1).sum()) for other in range(world) if other != rank)
    rows_ND = torch.zeros(own.tokens * own.top_k, own.dim, dtype=dtype)

    def move_rows() -> None:
        for _ in range(4):
            exchange.all_to_all(rows_ND, None, None, "bench")

    runs: dict[str, Any] = {name: contender.run for name, contender in found.items()}
    runs["exchange"] = move_rows
    number = torch.ones(1)
    times = interleave(runs, rounds, barrier=lambda: packed.comm.sum(number))
    least = 4 * visits * shape.dim * dtype.itemsize
    counted = {"bytes": sent, "least": least}
    return {"ms": times, "difference": differences, "left_out": left_out, **counted}


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
