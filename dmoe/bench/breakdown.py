"""Time of a layer by kind of operator, the same kinds for every library."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

KINDS = {
    "products": ("mm", "bmm", "addmm", "addmm_", "baddbmm", "_grouped_mm", "_scaled_mm"),
    "activation, weights": ("silu", "silu_backward", "sigmoid", "mul", "mul_"),
    "rows": (
        *("index", "index_select", "gather", "index_add", "index_add_", "_index_put_impl_"),
        *("scatter_add", "scatter_add_", "index_copy_", "_embedding_bag_forward_only"),
        *("_embedding_bag", "_embedding_bag_dense_backward"),
        "_embedding_bag_per_sample_weights_backward",
    ),
    "copies, sums": ("copy_", "cat", "stack", "fill_", "zero_", "add", "add_", "sum", "clone"),
}
"""Names of operators of aten, by kind."""
REST = "router, losses, autograd"
REPEATS = 3


def profile_kinds(run: Callable[[], None]) -> dict[str, float]:
    """Measure the milliseconds of one forward and backward by kind of operator.

    The time of an operator is that which no operator inside it takes. What is of no kind is
    `router, losses, autograd`: softmax, sorts, views, and the nodes of autograd themselves; time
    of Python between operators is not in it.
    """
    kinds = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(REPEATS):
            run()
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for event in recorded.events():
        found[kinds.get(event.name, REST)] += event.self_cpu_time_total / 1e3 / REPEATS
    return found
