"""Bytes that `dmoe plan` predicts, against the counters of real gloo ranks: one row per case.

    python -m benchmarks.planning_bytes [--ranks 1,2,4] [--json FILE] [--write]
    python -m benchmarks.planning_bytes --products

Six configs, each with ddp and fsdp. Weights, gradients, moments, what the all-to-alls send and what
sums and gathers send must be equal, the peak of the tensors in a step within 5%. The real peak is
the least of six steps: gloo's threads release a little later what they sent. The last column has
the peak with the buffers that a matrix product takes and returns within one call: oneDNN copies
blocks of bfloat16 operands, which no tensor holds (`--products` prints how much, by shape). From
the root of the repository, since the counters are those of the tests
(`tests/simulation/real_step.py`).

Letters: W ranks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.local_ranks import run_ranks
from dmoe.simulation.dry_run import dry_run
from dmoe.simulation.memory import memory, totals
from tests.simulation.real_step import measure, peaks

VOCABULARY = 256
SMALL = (
    "model.dim=32 model.layers=3 model.heads=2 moe.num_experts=8 moe.expert_dim=24 data.seq_len=16 "
    "data.source=synthetic:zipf train.global_batch=8 train.precision=fp32 train.device=cpu"
)
PADDED = "moe.exchange=padded moe.capacity.factor=1.25"
CONFIGS = {
    "packed": "moe.router.kind=workload moe.router.workload=W0",
    "padded, dense blocks between": f"{PADDED} model.dense_first=1 model.dense_dim=40",
    "16 fine-grained experts, shared": f"{PADDED} moe.num_experts=16 moe.top_k=4 moe.expert_dim=8 "
    "moe.experts.shared=1",
    "pooled capacity, Muon": f"{PADDED} moe.capacity.pool=2 optim.kind=muon",
    "soft, experts recomputed": "moe.router.kind=soft moe.top_k=8 train.recompute=experts",
    "bf16, blocks recomputed, accumulation": f"{PADDED} train.precision=bf16 train.recompute=block "
    "train.micro_batch=1",
}
"""Their exchange does not depend on values: padded slots, all experts, or forced routing."""
MODES = ("ddp", "fsdp")
DOCUMENT = Path(__file__).parent.parent / "docs" / "planning.md"
EXACT = ("weights", "gradients", "moments", "exchange", "sums")


def rows(worlds: Sequence[int] = (1, 2, 4)) -> list[dict[str, Any]]:
    """Run all cases; return one row each: predicted and real bytes, and the error of the peak."""
    found: list[dict[str, Any]] = []
    for world in worlds:
        cases = [(name, mode, _config(name, mode, world)) for name in CONFIGS for mode in MODES]
        real = list[dict[str, int]]()
        for _, same in groupby((c for *_, c in cases), lambda config: config.train.precision):
            # accelerate has one precision per process
            real += run_ranks(world, _measure_all, list(same), timeout=1200.0)[0]
        for (name, mode, config), counted in zip(cases, real, strict=True):
            predicted = predict(config, world)
            row: dict[str, Any] = {"config": name, "ranks": world, "mode": mode}
            row |= {part: [predicted[part], counted[part]] for part in (*EXACT, "peak")}
            row["differences"] = [p for p in EXACT if predicted[p] != counted[p]]
            row["peak_error"] = predicted["peak"] / counted["peak"] - 1
            row["allocated"] = counted["allocated"]
            found.append(row)
    return found


def _config(name: str, mode: str, world: int) -> Config:
    layout = f"parallel.mode={mode} parallel.ep={min(world, 2)}"
    return load(None, f"{SMALL} {CONFIGS[name]} {layout}".split())


def _measure_all(rank: int, world: int, configs: list[Config]) -> list[dict[str, int]]:
    return [measure(rank, world, config, VOCABULARY) for config in configs]


def predict(config: Config, world: int) -> dict[str, int]:
    """Return what the plan says of a step of one rank, on a CPU."""
    precision = config.train.precision
    run = dry_run(config, world, precision, cuda=False, num_outputs=VOCABULARY)
    used, (_, collectives) = memory(run), totals(run)
    exchange = sum(c.sent * n for c, n in collectives.items() if c.name == "all_to_all")
    everything = sum(c.sent * n for c, n in collectives.items())
    state = {name: getattr(used, name) for name in ("weights", "gradients", "moments")}
    traffic = {"exchange": exchange, "sums": everything - exchange}
    return state | traffic | {"peak": used.peak - run.before}


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the rows as a table in Markdown."""
    lines = [
        "| config | ranks | mode | weights | gradients | moments | all-to-alls | sums, gathers | "
        "differences | peak, predicted / real | with work buffers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        numbers = [f"{row[part][0]:,}" for part in EXACT]
        different = ", ".join(row["differences"]) or "none"
        cells = [row["config"], str(row["ranks"]), row["mode"], *numbers, different]
        ratios = 1 + row["peak_error"], row["peak"][0] / row["allocated"]
        lines.append("| " + " | ".join([*cells, *(f"{r:.3f}" for r in ratios)]) + " |")
    return lines


def summary(found: list[dict[str, Any]]) -> list[str]:
    """Return one row per config: equal rows, and the least and largest ratio of the peaks."""
    lines = [
        "| config | rows with equal bytes | peak of tensors, predicted / real "
        "| with work buffers |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["config"] for row in found):
        same = [row for row in found if row["config"] == name]
        equal = sum(not row["differences"] for row in same)
        tensors = [1 + row["peak_error"] for row in same]
        everything = [row["peak"][0] / row["allocated"] for row in same]
        ratios = (f"{min(part):.3f} to {max(part):.3f}" for part in (tensors, everything))
        lines.append("| " + " | ".join([name, f"{equal} of {len(same)}", *ratios]) + " |")
    return lines


def products(sizes: Sequence[int] = (16, 64, 256, 1024, 4096)) -> list[str]:
    """Return the work buffers of bfloat16 products of n x n matrices on one thread, as a table."""
    torch.set_num_threads(1)
    lines = ["| n | operands and result | work buffers | share |", "|---|---|---|---|"]
    for n in sizes:
        left, right = torch.ones(2, n, n, dtype=torch.bfloat16)
        out = left @ right.t()
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.mm(left.t(), right, out=out)
        buffers = peaks(profile)[1]
        lines.append(f"| {n} | {6 * n * n:,} | {buffers:,} | {buffers / (6 * n * n):.1%} |")
    return lines


def write(lines: list[str]) -> None:
    """Put lines between the markers of docs/planning.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, begin, rest = text.partition("<!-- step bytes: begin -->")
    _, end, after = rest.partition("<!-- step bytes: end -->")
    assert end, f"{DOCUMENT} has no markers"
    DOCUMENT.write_text(before + "\n".join([begin, *lines, end]) + after, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="change docs/planning.md")
    parser.add_argument("--products", action="store_true", help="work buffers of products only")
    arguments = parser.parse_args()
    if arguments.products:
        print("\n".join(products()))
        raise SystemExit
    done = rows([int(world) for world in arguments.ranks.split(",")])
    print("\n".join(table(done)))
    if arguments.json:
        arguments.json.write_text(json.dumps(done, indent=1), encoding="utf-8")
    if arguments.write:
        write([*summary(done), "", *products()])
