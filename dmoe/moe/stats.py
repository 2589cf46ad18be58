"""What one MoE layer did in one forward, counted from tensors that are there anyway.

Letters: E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dmoe.moe.balance import choice_count
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["LayerStats", "ObservedContext", "MetricsFn", "layer_stats", "nothing_more", "observed"]

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
        slots = torch.full_like(self.dropped_weight, self.slots, dtype=torch.float64)  # a share can be a fraction
        scalars = [self.dropped_weight.double(), self.total_weight.double(), self.fully_dropped_tokens.double(), slots]
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
        return LayerStats(choice_E, choice_E, zero, made_TK.sum(), torch.zeros_like(choice_E[0]), 0, chosen.num_zero_cost)
    assert limited.keep_TK is not None
    assert limited.capacity is not None
    chose_T = torch.ones_like(limited.keep_TK[:, 0]) if chosen.keep_TK is None else chosen.keep_TK.any(-1)
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
def observed(stats: LayerStats, chosen: Routing, limited: Routing, context: TokenContext) -> LayerStats:
    """`stats` with what the context asks for, if it is one that asks."""
    if not isinstance(context, ObservedContext):
        return stats
    return replace(stats, observed=context.observer(chosen, limited, context))
