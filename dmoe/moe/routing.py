"""What a router decides, what it may look at, and the protocol every router follows.

Letters: T tokens on this rank in one micro-batch, D width, E experts (global), K experts a token, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Router", "Routing", "TokenContext"]


@dataclass(frozen=True)
class TokenContext:
    """What a layer may know of its tokens besides their vectors. Every field has a neutral default."""

    valid_T: Tensor | None = None
    """bool; False marks padding, which is never routed and never counted. None: every token is real."""
    prior_count_LE: Tensor | None = None
    """int64; choices of the optimizer step's earlier accumulation steps, over all data ranks (global balance loss)."""


@dataclass(frozen=True)
class Routing:
    """A decision: token t goes to experts `expert_TK[t]` and sums their outputs with `weight_TK[t]`.

    After the router, `keep_TK` says which of the K choices were made at all (padding has none); after `capacity.limit`, which
    of them found a slot.
    """

    expert_TK: Tensor
    """int64, in order of preference."""
    weight_TK: Tensor
    """float32 (float64 for a float64 model): combine weights; carries the main loss's gradient to the router."""
    score_TE: Tensor
    """float32 or float64, non-negative: softmax or sigmoid of the logits, over all experts."""
    logit_TE: Tensor
    """float32 or float64."""
    scale: float = 1.0
    """The factor that is already in `weight_TK`; it stays when weights are renormalised over the survivors."""
    keep_TK: Tensor | None = None
    """bool; None means all, which lets the dispatcher skip masks and a host sync."""
    slot_TK: Tensor | None = None
    """int64; the place of each choice in the queue of its (group, expert), set by `capacity.limit`."""
    capacity: int | None = None
    """Slots C of one (group, expert); None is dropless."""
    groups: int = 1
    """Number G of equal, contiguous groups of tokens that share a capacity."""


class Router(Protocol):
    """Chooses experts. An `nn.Module` or anything callable."""

    def __call__(self, x_TD: Tensor, context: TokenContext) -> Routing: ...
