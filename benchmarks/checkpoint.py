"""Saving, as the training loop feels it: seconds it is held up, MB/s, and how much slower it runs while the writer is at work.

    python -m benchmarks.checkpoint                                   # 200 M parameters and two Adam moments, fp32: 2.4 GB
    python -m benchmarks.checkpoint --parameters 20e6 --ranks 2       # experts sharded over 2 ranks, each writes half
    python -m benchmarks.checkpoint --folder /mnt/disk --json

Rows of the table, one save a round, medians over the rounds and their range:
  synchronous   the caller waits for everything: write, hash, commit, verify, prune
  asynchronous  the caller waits for a copy of its tensors

  held s        seconds in `save`; the first one is given apart, since it makes the copy's buffers
  total s       from the call to a verified checkpoint
  MB/s          bytes of the checkpoint over `total s`
  slower        of a loop of matrix products: its time for a product while the writer runs, over that without a writer
  stall ms      the longest single product while the writer runs; (alone) the longest one without

The loop needs Python's lock between two products: a writer that keeps the lock shows as a stall.
Memory: the state, its copy, and what the disk's cache takes; `--parameters` makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dmoe.checkpoint import AsyncSaver, SavedCheckpoint
from dmoe.distributed.local_ranks import run_ranks
from dmoe.distributed.mesh import build_mesh

MOMENTS = ("model", "optim.exp_avg", "optim.exp_avg_sq")
TENSORS = 24  # a name each, as a model of a few layers has them
WIDTH = 512


def state_of(parameters: int, world: int) -> dict[str, Tensor]:
    """`parameters` numbers and two moments, all sharded: this rank's part is 1/world of each tensor."""
    rows = parameters // (TENSORS * WIDTH * world)
    local = {f"{kind}.{n}": torch.randn(rows, WIDTH) for kind in MOMENTS for n in range(TENSORS)}
    if world == 1:
        return local
    mesh = init_device_mesh("cpu", (world,))
    return {
        name: DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
        for name, tensor in local.items()
    }


def products(seconds: float, running: Callable[[], bool], size: int = 512) -> list[float]:
    """Seconds of each matrix product, for as long as `running` and at most `seconds`."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    times, end = [], time.perf_counter() + seconds
    while running() and time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return times


def measure(
    rank: int,
    world: int,
    root: Path,
    parameters: int,
    rounds: int,
    asynchronous: bool,
    threads: int,
) -> dict[str, Any]:
    """One rank's figures: a save a round, into the same directory, keeping one."""
    torch.set_num_threads(threads)
    group = (
        build_mesh(1, torch.device("cpu"), timeout=600.0).checkpoint_group if world > 1 else None
    )
    state, saver = state_of(parameters, world), AsyncSaver(root, 1, group, asynchronous)
    alone = products(3.0, lambda: True)
    done: list[SavedCheckpoint] = []
    beside: list[list[float]] = []

    def writing() -> bool:
        done.extend(saver.take_finished())
        return len(done) < len(beside) + 1 and not saver.failed

    for step in range(rounds + 1):  # the first one warms up: buffers, page cache
        saver.save(step, state, {})
        beside.append(products(600.0, writing))
    saver.close()
    first, *rest = done
    return {
        "first_held": first.blocking_seconds,
        "held": [saved.blocking_seconds for saved in rest],
        "total": [saved.seconds for saved in rest],
        "bytes": rest[0].bytes,
        "slower": [
            statistics.mean(times) / statistics.mean(alone) for times in beside[1:] if times
        ],
        "stall": [max(times) * 1e3 for times in beside[1:] if times],
        "stall_alone": max(alone) * 1e3,
    }


def row_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank's figures in each round: it is the one that the others wait for."""
    worst = {
        key: [max(values) for values in zip(*(r[key] for r in results), strict=True)]
        for key in ("held", "total", "slower", "stall")
    }
    speed = [results[0]["bytes"] / seconds / 1e6 for seconds in worst["total"]]
    singles = {
        key: max(result[key] for result in results)
        for key in ("first_held", "bytes", "stall_alone")
    }
    return worst | singles | {"mb_per_second": speed}


def spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def show(rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"{'':24}{'held s':>20}{'first':>8}{'total s':>22}{'MB/s':>18}{'slower':>20}{'stall ms (alone)':>28}"
    )
    for name, row in rows.items():
        stall = f"{spread(row['stall'], 0)} ({row['stall_alone']:.0f})" if row["stall"] else "-"
        print(
            f"{name:24}{spread(row['held']):>20}{row['first_held']:>8.2f}{spread(row['total']):>22}"
            f"{spread(row['mb_per_second'], 0):>18}{spread(row['slower']):>20}{stall:>28}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parameters",
        type=float,
        default=200e6,
        help="numbers of the model; the state has three times as many",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each rank")
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where to write; default: the system's temporary folder",
    )
    parser.add_argument(
        "--json", action="store_true", help="the numbers as JSON on stdout, nothing else there"
    )
    args = parser.parse_args()
    rows = {}
    for ranks in args.ranks:
        for mode in ("synchronous", "asynchronous"):
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                arguments = (
                    Path(folder),
                    int(args.parameters),
                    args.rounds,
                    mode == "asynchronous",
                    args.threads,
                )
                rows[f"{mode}, {ranks} rank{'s' if ranks > 1 else ''}"] = row_of(
                    run_ranks(ranks, measure, *arguments, timeout=1800.0)
                )
    if args.json:
        print(
            json.dumps(
                {
                    "parameters": int(args.parameters),
                    "threads": args.threads,
                    "torch": torch.__version__,
                    "rows": rows,
                }
            )
        )
    else:
        show(rows)


if __name__ == "__main__":
    main()
