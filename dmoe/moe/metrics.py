"""What one MoE layer did in one forward, counted from tensors that are there anyway.

Letters: E experts, K experts a token.

What a layer can be asked to tell of one forward, beside its counts: tensors on the device, sums without a host read.

An observer is handed to the layers with the batch (`stats.ObservedContext`), so a step that nobody logs does not compute any of this.
What it finds is returned with the layer's stats and kept nowhere; a forward that is run again for backward counts nothing twice.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dmoe.moe.load_balancing import choice_count
from dmoe.moe.load_balancing.groups import masked, normalized, real_tokens
from dmoe.moe.routing import Routing, TokenContext

MetricsFn = Callable[[Routing, Routing, TokenContext], dict[str, Tensor]]
"""From a layer's routing before and after the capacity to what is wanted of it, by name; on the device, without a host read."""


def nothing_more(chosen: Routing, limited: Routing, context: TokenContext) -> dict[str, Tensor]:
    """The observer of a forward that nobody asks for more than its counts."""
    return {}


@dataclass(frozen=True)
class ObservedContext(TokenContext):
    """A context that asks the layers for more than their counts: on the steps that are logged, and of the probe batch."""

    observer: MetricsFn = nothing_more


@dataclass(frozen=True)
class LayerStats:
    """Device tensors without gradient; sums, so that ranks and micro-batches add up. They are *returned*, never kept in a buffer,
    so that recomputing the activations cannot count twice (torchtitan halves its counters for that reason)."""

    choice_E: Tensor
    """int64: choices of each expert, before any drop."""
    kept_E: Tensor
    """int64: rows each expert computed, rerouted ones (`overflow: next_choice`) at the expert that took them."""
    dropped_weight: Tensor
    """float: sum of the weights the router gave to choices that were then dropped; a rerouted choice is not."""
    total_weight: Tensor
    """float: sum of the weights of all choices."""
    fully_dropped_tokens: Tensor
    """int64: tokens that chose at least one expert and were left with none."""
    slots: float
    """This rank's share of the slots offered by the capacity; 0 when dropless."""
    num_zero_cost: int = 0
    """The last so many experts cost nothing and have no slots."""
    observed: dict[str, Tensor] = field(default_factory=dict)
    """What the context's observer was asked to find; empty where there is none."""

    def as_vector(self) -> Tensor:
        """float64 [2E + 4]: all counts in one tensor, for one reduction over all layers and ranks. Counts stay exact to 2^53."""
        slots = torch.full_like(
            self.dropped_weight, self.slots, dtype=torch.float64
        )  # a share can be a fraction
        scalars = [
            self.dropped_weight.double(),
            self.total_weight.double(),
            self.fully_dropped_tokens.double(),
            slots,
        ]
        return torch.cat([self.choice_E.double(), self.kept_E.double(), torch.stack(scalars)])


@torch.no_grad()
def layer_stats(chosen: Routing, limited: Routing) -> LayerStats:
    """Stats of one forward from the routing before and after the capacity. No host sync."""
    choice_E = choice_count(chosen, 1)[0]
    made_TK = chosen.weight_TK.detach()
    if chosen.keep_TK is not None:
        made_TK = made_TK.masked_fill(~chosen.keep_TK, 0.0)
    zero = made_TK.new_zeros(())
    if limited is chosen:
        return LayerStats(
            choice_E,
            choice_E,
            zero,
            made_TK.sum(),
            torch.zeros_like(choice_E[0]),
            0,
            chosen.num_zero_cost,
        )
    assert limited.keep_TK is not None
    assert limited.capacity is not None
    chose_T = (
        torch.ones_like(limited.keep_TK[:, 0]) if chosen.keep_TK is None else chosen.keep_TK.any(-1)
    )
    return LayerStats(
        choice_E=choice_E,
        kept_E=choice_count(limited, 1)[0],
        dropped_weight=made_TK.masked_fill(limited.keep_TK, 0.0).sum(),
        total_weight=made_TK.sum(),
        fully_dropped_tokens=(chose_T & ~limited.keep_TK.any(-1)).sum(),
        slots=limited.slots,
        num_zero_cost=chosen.num_zero_cost,
    )


@torch.no_grad()
def observed(
    stats: LayerStats, chosen: Routing, limited: Routing, context: TokenContext
) -> LayerStats:
    """`stats` with what the context asks for, if it is one that asks."""
    if not isinstance(context, ObservedContext):
        return stats
    return replace(stats, observed=context.observer(chosen, limited, context))


SUMS = ("made_K", "kept_K", "weight_K", "dropped_K", "entropy", "top1", "tokens")
"""What `router_state` returns that adds up over micro-batches and ranks."""
MAXIMA = ("logit_max",)
"""What it returns of which the largest counts."""


def router_metrics(chosen: Routing, limited: Routing, context: TokenContext) -> dict[str, Tensor]:
    """float64 vectors by name (a scalar has one element): how sure the router was, and what became of each choice.

    With p_t = the token's scores, normalised to sum 1, over real tokens:
    entropy = sum_t sum_e -p ln p (nats); top1 = sum_t max_e p; logit_max = the largest |logit| of any expert, noise included.
    By place k of a choice in its token's list: made_K and kept_K count it, weight_K and dropped_K sum the router's weights of it. A
    choice that was rerouted (`overflow: next_choice`) is kept. About fifteen small kernels over [T, E]; no collective.
    """
    made_TK = (
        torch.ones_like(chosen.expert_TK, dtype=torch.bool)
        if chosen.keep_TK is None
        else chosen.keep_TK
    )
    kept_TK = made_TK if limited.keep_TK is None else limited.keep_TK
    weight_TK = chosen.weight_TK.double().masked_fill(~made_TK, 0.0)
    share_TE = normalized(chosen.score_TE)
    sure_T2 = torch.stack([torch.special.entr(share_TE).sum(-1), share_TE.amax(-1)], dim=1)
    entropy, top1 = masked(sure_T2.double(), context.valid_T).sum(0).split(1)
    logit_TE = masked(chosen.logit_TE.abs(), context.valid_T)
    return {
        "made_K": made_TK.sum(0).double(),
        "kept_K": kept_TK.sum(0).double(),
        "weight_K": weight_TK.sum(0),
        "dropped_K": weight_TK.masked_fill(kept_TK, 0.0).sum(0),
        "entropy": entropy,
        "top1": top1,
        "tokens": real_tokens(chosen.score_TE, context.valid_T).double(),
        # A rank may have no tokens at all, and a maximum of nothing is an error.
        "logit_max": torch.cat([logit_TE.flatten(), logit_TE.new_zeros(1)]).amax().double().view(1),
    }


def decisions(chosen: Routing, limited: Routing, context: TokenContext) -> dict[str, Tensor]:
    """Each token's experts before any drop, `chosen_TE` (bool), and the first of them, `first_TE` (bool; all False for padding)."""
    made_TK = (
        torch.ones_like(chosen.expert_TK, dtype=torch.bool)
        if chosen.keep_TK is None
        else chosen.keep_TK
    )
    none_TE = torch.zeros_like(chosen.score_TE, dtype=torch.int64)
    first_T1, made_T1 = chosen.expert_TK[:, :1], made_TK[:, :1]
    return {
        "chosen_TE": none_TE.scatter_add(1, chosen.expert_TK, made_TK.long()) > 0,
        "first_TE": none_TE.scatter_add(1, first_T1, made_T1.long()) > 0,
    }
