"""The break-even of a copy for the step: the rows that it has to take over so that it pays.

    break-even = seconds to send an expert's weights to another rank and its gradient back
                 / seconds that a row takes in an expert, forward and backward

Both are measured when a run with `copies: auto` starts, in about 0.1 s, with one expert's matrices:
products of `ROWS` rows; an all-to-all in which each rank of the EP group sends one expert. The
largest ratio of any rank is everybody's, by one all-reduce, so all plans are equal. Independent of
the widths it is about `transfers * itemsize * FLOP/s / (FLOPs per weight * bytes/s)`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from dmoe.distributed.gradients import all_reduce_max
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.placement.copies import CopyingAllToAll
from dmoe.moe.base_layer import MoELayer

ROWS, REPEATS = 256, 3
LARGEST = 1 << 30


def passes(recompute: bool) -> tuple[int, int]:
    """Return the transfers of an expert in a step, and the products with each weight per row.

    Weights there and gradients back, one product in forward and two in backward; recomputation
    repeats those of forward.
    """
    return 2 + recompute, 3 + recompute


def measure_break_even(
    model: nn.Module, mesh: ParallelMesh, dtype: torch.dtype, recompute: bool = False
) -> int | None:
    """Measure the break-even and give it to all dispatchers that copy. Collective.

    Args:
        model: after `shard_experts`, with weights.
        mesh: of the ranks.
        dtype: of the products and the transfers.
        recompute: whether forward is computed twice.

    Returns:
        The break-even in rows; None if nothing copies.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    dispatchers = [layer.packed for layer in layers if isinstance(layer.packed, CopyingAllToAll)]
    if not dispatchers:
        return None
    stacks = [p for p in layers[0].experts.parameters() if p.ndim == 3]
    largest = max(stacks, key=lambda stack: stack[0].numel())[0].detach().to(dtype)
    weights = sum(stack[0].numel() for stack in stacks)
    rows = largest.new_ones(ROWS, largest.shape[0])
    per_row = _seconds(lambda: rows @ largest, largest) / ROWS * weights / largest.numel()
    group, ranks = dispatchers[0].expert_group, dispatchers[0].num_ranks
    buffer, to_next = largest.new_zeros(1, weights), [0] * ranks
    to_next[(mesh.ep_rank + 1) % ranks] = 1
    from_previous = [0] * ranks
    from_previous[(mesh.ep_rank - 1) % ranks] = 1
    transfer = _seconds(
        lambda: group.all_to_all(buffer, to_next, from_previous, "cost of a copy"), buffer
    )
    transfers, products = passes(recompute)
    ratio = torch.tensor([transfer * transfers / (per_row * products)], dtype=torch.float64)
    worst = all_reduce_max(ratio.to(largest.device), mesh).item()
    break_even = min(LARGEST, max(1, math.ceil(worst)))
    for dispatcher in dispatchers:
        dispatcher.rule = replace(dispatcher.rule, break_even=break_even)
    return break_even


def _seconds(call: Callable[[], object], like: Tensor) -> float:
    """Return the median time of a call, once the device is idle, after one to warm up."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        found.append(time.perf_counter() - start)
    return median(found[1:])
