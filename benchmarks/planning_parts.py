"""Parts of a training step that `dmoe plan` predicts beside the measured ones: docs/planning.md.

    python -m benchmarks.planning_parts --cluster FILE [--write] [--config NAME] [--ranks 1,2]

Each config of `benchmarks.planning` is trained on W local gloo ranks, and each operator of three
steps of rank 0 is timed where it runs. What a step takes beyond its operators is the host's time
and the collectives. Router and experts are as in training; a plan has balanced ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections import Counter

from benchmarks.planning import CONFIGS, VOCABULARY, config_of, write
from dmoe.distributed.local_ranks import run_ranks
from dmoe.simulation.calibration.timed_step import TimedStep, time_steps
from dmoe.simulation.cluster import Cluster, load_cluster
from dmoe.simulation.dry_run import dry_run
from dmoe.simulation.measured import at
from dmoe.simulation.memory import totals
from dmoe.simulation.recording.kernel import Kernel

BEGIN, END = "<!-- step parts: begin -->", "<!-- step parts: end -->"
COPIES = {"_to_copy", "copy_", "clone", "cat", "index_select", "index_add_", "stack", "gather"}
PARTS = ("products", "copies and casts", "loss", "optimizer", "other kernels", "rest")


def part_of(kernel: Kernel) -> str:
    """Return the part of a step that a kernel is of."""
    if kernel.name in ("gemm", "attention"):
        return "products"
    if kernel.name in COPIES:
        return "copies and casts"
    if "softmax" in kernel.name or kernel.name in ("exp_", "logsumexp"):
        return "loss"
    if kernel.name.startswith(("_fused", "_foreach")):
        return "optimizer"
    return "other kernels"


def measure(name: str, world: int) -> TimedStep:
    """Train, with each operator timed."""
    threads = max(1, len(os.sched_getaffinity(0)) // world)
    arguments = (config_of(name), VOCABULARY, threads, 1.0, 3)
    found: TimedStep = run_ranks(world, time_steps, *arguments)[0]
    return found


def compare(name: str, world: int, found: TimedStep, cluster: Cluster) -> str:
    """Return a row of the table: milliseconds, predicted / measured, of each part."""
    config = config_of(name)
    precision = "bf16" if config.train.precision == "bf16" else "fp32"
    run = dry_run(config, world, precision, cuda=False, num_outputs=VOCABULARY)
    kernels, collectives = totals(run)
    compute, shared, link = at(list(cluster.measured), world)
    predicted, real = Counter[str](), Counter[str]()
    for kernel, count in kernels.items():
        predicted[part_of(kernel)] += 1000 * shared * count * compute.kernel_seconds(kernel)
        predicted["rest"] += 1000 * shared * count * compute.host_seconds
    for collective, count in collectives.items():
        predicted["rest"] += 1000 * count * link.collective_seconds(collective)
    for kernel, often, seconds in found.kernels:
        real[part_of(kernel)] += 1000 * often * seconds
    step = 1000 * statistics.median(found.seconds)
    real["rest"] = step - real.total()
    cells = [f"{predicted[part]:.0f} / {real[part]:.0f}" for part in PARTS]
    whole = f"{predicted.total():.0f} / {step:.0f}"
    return f"| {name} | {world} | {' | '.join([*cells, whole])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cluster", default="laptop")
    parser.add_argument("--config", choices=CONFIGS, help="this one only")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--write", action="store_true", help="change docs/planning.md")
    given = parser.parse_args()
    cluster = load_cluster(given.cluster)
    lines = [f"| config | ranks | {' | '.join(PARTS)} | step |", "|---" * (len(PARTS) + 3) + "|"]
    for name in [given.config] if given.config else CONFIGS:
        for world in map(int, given.ranks.split(",")):
            lines.append(compare(name, world, measure(name, world), cluster))
    lines += ["", f"Cluster file: {cluster.name}."]
    write(lines, BEGIN, END) if given.write else print("\n".join(lines))


if __name__ == "__main__":
    main()
