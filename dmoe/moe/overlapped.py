"""The middle of a layer with an exchange that runs beside other work: dispatch to combine.

Letters: T tokens, D input width, M output width.
"""

from __future__ import annotations

from torch import Tensor

from dmoe.moe.base_layer import MoELayer, forward_takes
from dmoe.moe.chunks import ChunkingDispatcher
from dmoe.moe.dispatch import profiled
from dmoe.moe.experts.dense import InSteps
from dmoe.moe.interfaces import OverlappingDispatcher
from dmoe.moe.routing import DispatchPlan


def overlapped(
    layer: MoELayer,
    dispatcher: OverlappingDispatcher,
    x_TD: Tensor,
    plan: DispatchPlan,
    shared: InSteps | None,
) -> Tensor:
    """Compute the shared experts while rows are under way, one product in each direction.

    Args:
        layer: whose experts compute.
        dispatcher: that of its options.
        x_TD: tokens in the experts' dtype.
        plan: with physical expert ids.
        shared: the shared experts of this forward, if there are any.

    Returns:
        y_TM, the weighted sums of the experts' outputs.
    """
    with profiled("dispatch"):
        arrive = dispatcher.start_dispatch(x_TD, plan)
    if shared is not None:
        shared.advance()
    with profiled("dispatch"):
        rows_RD, row_counts, metadata, send_gradient = arrive()
    with profiled("experts"):
        sends_gradient = forward_takes(layer.experts, "sends_gradient")
        more = (None, send_gradient) if sends_gradient else ()
        rows_RM = layer.run_experts(rows_RD, row_counts, *more)
    with profiled("combine"):
        returned = dispatcher.start_combine(rows_RM, plan.weight_TK, metadata)
    if shared is not None:
        shared.advance()
    with profiled("combine"):
        return returned()


def in_chunks(
    layer: MoELayer,
    dispatcher: ChunkingDispatcher,
    x_TD: Tensor,
    plan: DispatchPlan,
    shared: InSteps | None,
) -> Tensor:
    """Compute the experts of one chunk while others are under way; arguments as `overlapped`."""
    steps = shared if dispatcher.overlaps else None
    with profiled("dispatch"):
        chunks, metadata = dispatcher.start_chunks(x_TD, plan, layer.recompute_experts)
    if steps is not None:
        steps.advance()
    with profiled("experts"):
        returning = layer.experts([chunk.departed for chunk in chunks.chunks], chunks)
    if steps is not None:
        steps.advance()
    with profiled("combine"):
        return dispatcher.finish(returning, plan.weight_TK, metadata)
