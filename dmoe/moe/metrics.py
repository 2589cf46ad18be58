"""Counts and metrics of one forward of a MoE layer: device tensors, sums, no host read.

Each is memory of its own: a caller may add to one in place, and changes nothing else.

They are returned with the layer's output and kept nowhere, so that recomputed activations count
nothing twice. Further metrics are computed only if the context asks for them
(`TokenContext.metrics_fn`): steps that are not logged do not pay for them.

Letters: T tokens, E experts, K experts per token, V = E + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.export import register_dataclass

from dmoe.moe.compute_usage import ComputeUsage
from dmoe.moe.load_balancing.losses import normalized, num_real_tokens
from dmoe.moe.routing import (
    EMPTY_CONTEXT,
    DispatchPlan,
    Routing,
    TokenContext,
    count_per_expert,
    masked,
)


@dataclass(frozen=True)
class LayerStats:
    """Counts of one forward, without gradient; sums, so that ranks and micro-batches add up.

    Returned, never kept in a buffer, so that recomputed activations cannot count twice (torchtitan
    halves its counters for that reason).
    """

    choice_E: Tensor
    """int64: assignments of each expert before any drop."""
    kept_E: Tensor
    """int64: rows each expert computed; rerouted ones (`overflow: next_choice`) count at the expert
    that took them."""
    dropped_weight: Tensor
    """float: sum of the router's weights of dropped assignments; rerouted ones are not dropped."""
    total_weight: Tensor
    """float: sum of the weights of all assignments."""
    fully_dropped_tokens: Tensor
    """int64: tokens that selected at least one expert and kept none."""
    slots: float
    """This rank's share of the slots offered by the capacity; 0 if dropless."""
    num_zero_cost: int = 0
    """Number of zero-cost experts (highest ids), which have no slots."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Result of the context's `metrics_fn`; empty without one."""

    def as_vector(self) -> Tensor:
        """Concatenate all counts, float64 [2E + 4], for one reduction over all layers and ranks.

        Counts stay exact up to 2^53.
        """
        # a share of slots can be a fraction
        slots = torch.full_like(self.dropped_weight, self.slots, dtype=torch.float64)
        scalars = [
            self.dropped_weight.double(),
            self.total_weight.double(),
            self.fully_dropped_tokens.double(),
            slots,
        ]
        return torch.cat([self.choice_E.double(), self.kept_E.double(), torch.stack(scalars)])


@torch.no_grad()
def layer_stats(
    routing: Routing, plan: DispatchPlan, context: TokenContext = EMPTY_CONTEXT
) -> LayerStats:
    """Count one forward, before and after capacity. No host sync."""
    weight_TK = routing.weight_TK.detach()
    if routing.selected_TK is not None:
        weight_TK = weight_TK.masked_fill(~routing.selected_TK, 0.0)
    metrics = {} if context.metrics_fn is None else context.metrics_fn(routing, plan, context)
    if plan.slots is None:
        return LayerStats(
            **_dropless_counts(routing, plan, weight_TK.dtype),
            total_weight=weight_TK.sum(),
            slots=0.0,
            num_zero_cost=plan.num_zero_cost,
            metrics=metrics,
        )
    keep_TK = plan.is_kept_TK
    has_selected_T = routing.is_selected_TK.any(-1)
    return LayerStats(
        choice_E=routing.choice_count()[0].clone(),
        kept_E=count_per_expert(plan.expert_TK, keep_TK, 1, plan.num_experts)[0],
        dropped_weight=weight_TK.masked_fill(keep_TK, 0.0).sum(),
        total_weight=weight_TK.sum(),
        fully_dropped_tokens=(has_selected_T & ~keep_TK.any(-1)).sum(),
        slots=plan.slots.offered,
        num_zero_cost=plan.num_zero_cost,
        metrics=metrics,
    )


def _dropless_counts(routing: Routing, plan: DispatchPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the counts where nothing is dropped, as parts of one tensor that nothing else reads.

    No launch where the sort of the assignments has made it, else one. `dtype`: of weights.
    """
    counts = routing.counts
    count_2V, counts.copies_2V = counts.copies_2V, None
    if count_2V is None:
        choice_E = routing.choice_count()[0]
        zero_1 = plan.ranges.get(1, choice_E.device)
        count_2V = torch.cat([choice_E, zero_1, choice_E, zero_1]).view(2, -1)
    return {
        "choice_E": count_2V[0, :-1],
        "kept_E": count_2V[1, :-1],
        "fully_dropped_tokens": count_2V[0, -1],
        # the bits of 0 are those of 0.0
        "dropped_weight": count_2V[1, -1:].view(dtype)[0],
    }


SUMS = ("made_K", "kept_K", "weight_K", "dropped_K", "entropy", "top1", "tokens")
"""Keys of `router_metrics` that add up over micro-batches and ranks."""
MAXIMA = ("logit_max",)
"""Keys of `router_metrics` whose maximum counts."""


def router_metrics(
    routing: Routing, plan: DispatchPlan, context: TokenContext
) -> dict[str, Tensor]:
    """Compute the router's confidence and the outcome of each choice; a `MetricsFn`.

    With p_t = the token's scores, normalized to sum 1, over real tokens: entropy = sum_t sum_e -p
    ln p (nats); top1 = sum_t max_e p; logit_max = the largest |logit| of any expert, noise
    included. By rank k of a choice in its token's list: made_K counts the selected ones, kept_K the
    kept ones (rerouted ones are kept); weight_K and dropped_K sum the router's weights of the
    selected and of the dropped ones. About fifteen small kernels over [T, E]; no collective.

    Returns:
        float64 vectors by name; a scalar has one element.
    """
    selected_TK = routing.is_selected_TK
    kept_TK = selected_TK if plan.keep_TK is None else plan.keep_TK
    weight_TK = routing.weight_TK.double().masked_fill(~selected_TK, 0.0)
    share_TE = normalized(routing.score_TE)
    confidence_T2 = torch.stack([torch.special.entr(share_TE).sum(-1), share_TE.amax(-1)], dim=1)
    entropy, top1 = masked(confidence_T2.double(), context.valid_T).sum(0).split(1)
    logit_TE = masked(routing.logit_TE.abs(), context.valid_T)
    # A rank may have no tokens, and the maximum of an empty tensor is an error.
    logit_max = torch.cat([logit_TE.flatten(), logit_TE.new_zeros(1)]).amax()
    return {
        "made_K": selected_TK.sum(0).double(),
        "kept_K": kept_TK.sum(0).double(),
        "weight_K": weight_TK.sum(0),
        "dropped_K": weight_TK.masked_fill(kept_TK, 0.0).sum(0),
        "entropy": entropy,
        "top1": top1,
        "tokens": num_real_tokens(routing.score_TE, context.valid_T).double(),
        "logit_max": logit_max.double().view(1),
    }


def decisions(routing: Routing, plan: DispatchPlan, context: TokenContext) -> dict[str, Tensor]:
    """Return each token's experts before any drop, one-hot; a `MetricsFn`.

    Returns:
        `chosen_TE`, bool: all selected experts. `first_TE`, bool: the first one; False for
        padding.
    """
    selected_TK = routing.is_selected_TK
    zero_TE = torch.zeros_like(routing.score_TE, dtype=torch.int64)
    first_T1, first_selected_T1 = routing.expert_TK[:, :1], selected_TK[:, :1]
    return {
        "chosen_TE": zero_TE.scatter_add(1, routing.expert_TK, selected_TK.long()) > 0,
        "first_TE": zero_TE.scatter_add(1, first_T1, first_selected_T1.long()) > 0,
    }


@dataclass(frozen=True)
class MoEOutput:
    """The result of one forward."""

    y: Tensor
    """[..., out_dim], in the dtype the experts computed in."""
    aux: dict[str, Tensor]
    """This rank's share of each auxiliary loss, unweighted, by name; on one process, the loss."""
    stats: LayerStats
    """Counts of selected, kept and dropped assignments."""
    routing: Routing
    """The router's decision, before capacity."""
    plan: DispatchPlan
    """The assignments that were computed, after capacity."""
    compute_usage: ComputeUsage | None = None
    """Experts used and cost per token, computed on request."""


# Before torch 2.13, FSDP2 looks for tensors in pytrees only and silently misses a backward.
register_dataclass(MoEOutput)
