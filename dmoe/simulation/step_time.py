"""Time of a training step on a cluster, by part.

A kernel takes the longer of its arithmetic and its memory traffic (the roofline, Williams et al.
2009), and at least what the host needs to launch it:

    seconds = max(flops / (share * peak), bytes / bandwidth, kernel_seconds)

A collective takes its latency plus its bytes over the slowest link that it crosses (the alpha-beta
model, Hockney 1994). The all-to-alls of a layer are waited for; sums and gathers of parameters run
beside the computation of the same stage, and only what is longer is added.

Copies to the memory of the host take their bytes over its link. Those of activations are on the
stream of the computation, so nothing hides them; those of moments run beside the update.

Where the cluster file has measured times (`measured.py`), they are taken instead of both.

Letters: n ranks of a group, g of them on each node.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, fields

from dmoe.distributed.fake_world import Collective
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.dry_run import DryRun
from dmoe.simulation.measured import at
from dmoe.simulation.memory import repeated, state_of, totals
from dmoe.simulation.recording.kernel import Kernel

SHARES = {"gemm": "gemm", "grouped_gemm": "grouped_gemm"}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of the slowest rank, by part; they add up."""

    matrix: float
    """Matrix products: attention's projections, experts, logits."""
    attention: float
    memory: float
    """Everything else: norms, activations, permutations, router, loss, optimizer."""
    host: float
    """Added where the host cannot launch kernels fast enough."""
    exchange: float
    """The all-to-alls of the MoE layers."""
    gradients: float
    """Sums and gathers of parameters and gradients, as far as nothing hides them."""
    copies: float = 0.0
    """Activations and moments, to the memory of the host and back: `host_seconds`."""

    @property
    def total(self) -> float:
        return float(sum(getattr(self, part.name) for part in fields(self)))

    def scaled(self, factor: float) -> StepTime:
        """Return the times of a step that takes `factor` times as long, part by part."""
        return StepTime(*(factor * getattr(self, part.name) for part in fields(self)))


def step_time(run: DryRun, cluster: Cluster, ep: int) -> StepTime:
    """Return the time of one optimizer step."""
    if cluster.measured:
        return _measured(run, cluster)
    parts: defaultdict[str, float] = defaultdict(float)
    update = 0.0  # of the last stage
    for stage, times in repeated(run):
        seconds: defaultdict[str, float] = defaultdict(float)
        for kernel, count in stage.kernels.items():
            seconds[_part(kernel)] += count * kernel_seconds(kernel, cluster)
        device = sum(seconds.values())
        if cluster.device == "cuda":
            launched = cluster.kernel_seconds * sum(stage.kernels.values())
            seconds["host"] = max(0.0, launched - device)
        hidden = 0.0
        for collective, count in stage.collectives.items():
            took = count * collective_seconds(collective, run, cluster, ep)
            if collective.name == "all_to_all":
                seconds["exchange"] += took
            else:
                hidden += took
        seconds["gradients"] = max(
            hidden - cluster.overlap * device, hidden * (1 - cluster.overlap)
        )
        seconds["copies"] = stage.host_bytes / cluster.host_bandwidth
        update = seconds["memory"]
        for part, value in seconds.items():
            parts[part] += times * value
    parts["copies"] += moment_seconds(run, update, cluster)
    return StepTime(*(parts[field.name] for field in fields(StepTime)))


def moment_seconds(run: DryRun, update: float, cluster: Cluster) -> float:
    """Return what the copies of moments on the host (`optim.offload`) add to an update.

    They run both ways at a time beside the update, bucket by bucket, so the longer of the two is
    waited for. `update`: its seconds without them.
    """
    return max(0.0, state_of(run).host_moments / cluster.host_bandwidth - update)


def _measured(run: DryRun, cluster: Cluster) -> StepTime:
    """Return the time of a step from measured kernels and collectives, one after the other.

    Ranks that share a core take turns. Nothing is hidden: gloo computes on the same cores.
    """
    kernels, collectives = totals(run)
    world = max((collective.ranks for collective in collectives), default=1)
    compute, shared, link = at(list(cluster.measured), world)
    parts: defaultdict[str, float] = defaultdict(float)
    for kernel, count in kernels.items():
        parts[_part(kernel)] += shared * count * compute.kernel_seconds(kernel)
        parts["host"] += shared * count * compute.host_seconds
    for collective, count in collectives.items():
        part = "exchange" if collective.name == "all_to_all" else "gradients"
        parts[part] += count * link.collective_seconds(collective)
    return StepTime(*(parts[field.name] for field in fields(StepTime)))


def _part(kernel: Kernel) -> str:
    if kernel.name in SHARES:
        return "matrix"
    return "attention" if kernel.name == "attention" else "memory"


def kernel_seconds(kernel: Kernel, cluster: Cluster) -> float:
    """Return the seconds of one kernel call."""
    share = 1.0
    if kernel.name in SHARES:
        share = getattr(cluster, SHARES[kernel.name])
    elif kernel.name == "attention":
        share = cluster.attention_backward if kernel.shape[0] else cluster.attention_forward
    arithmetic = kernel.flops / (share * cluster.flops(kernel.dtype)) if kernel.flops else 0.0
    return max(arithmetic, kernel.bytes / cluster.bandwidth)


def collective_seconds(collective: Collective, run: DryRun, cluster: Cluster, ep: int) -> float:
    """Return the seconds of one collective call."""
    n = collective.ranks
    if collective.group == run.group_names.get("ep"):
        g = min(ep, cluster.devices)
    elif collective.group == run.group_names.get("edp"):
        g = max(1, cluster.devices // ep)
    else:
        g = cluster.devices
    if n <= g:
        rounds = 1.0 if collective.name == "all_to_all" else max(1.0, math.log2(n))
        return rounds * cluster.inside_seconds + collective.sent / cluster.inside_bandwidth
    nodes = math.ceil(n / g)
    if collective.name == "all_to_all":
        # Each rank sends to all others; to those of other nodes through its own port.
        inside = collective.sent * (g - 1) / (n - 1) / cluster.inside_bandwidth
        between = collective.sent * (n - g) / (n - 1) / cluster.between_bandwidth
        return cluster.between_seconds * math.log2(2 * nodes) + max(inside, between)
    # A ring enters and leaves each node once, over the ports of all its ranks there.
    slowest = min(cluster.inside_bandwidth, g * cluster.between_bandwidth)
    return cluster.between_seconds * math.log2(2 * nodes) + collective.sent / slowest
