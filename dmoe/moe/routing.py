"""What a router decides, what it may look at, and the protocol every router follows.

Letters: T tokens on this rank in one micro-batch, D width, E experts (global), K experts a token, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class TokenContext:
    """What a layer may know of its tokens besides their vectors. Every field has a neutral default."""

    valid_T: Tensor | None = None
    """bool; False marks padding, which is never routed and never counted. None: every token is real."""
    prior_count_LE: Tensor | None = None
    """int64; choices of the optimizer step's earlier accumulation steps, over all data ranks (global balance loss)."""
    token_id_T: Tensor | None = None
    """int64; the tokens themselves (hash routing)."""
    label_T: Tensor | None = None
    """int64; task, language or domain of each token (fixed routing)."""
    noise_key: tuple[int, int] | None = None
    """(seed, optimizer step): keys the noise of this forward. Needed in training by routers that draw any."""
    sequences: int = 1
    """Equal sequences these tokens are. Set by the layer."""
    groups: int = 1
    """Equal, contiguous groups of tokens that share a capacity. Set by the layer."""
    capacity: int | None = None
    """Slots C of one (group, expert), None when dropless. Set by the layer."""
    first_sequence: int = 0
    """Index of this forward's first sequence in the optimizer step's global batch; keys the noise with it, so that the noise does not
    depend on how the batch is spread over ranks."""
    budget: float | None = None
    """Share of all experts' multiply-adds that a token may spend (budget routing); None: as configured."""


@dataclass(frozen=True)
class Noise:
    """How a noisy router arrived at its logits (Shazeer 2017, eq. 4)."""

    clean_TE: Tensor
    """float: logits before the noise."""
    std_TE: Tensor
    """float: standard deviation of each logit's noise."""


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
    slots: float = 0.0
    """This rank's share of the slots offered over all experts: summed over the ranks, all there are. 0 when dropless."""
    next_expert_TS: Tensor | None = None
    """int64 [T, S]: the next eligible experts after the chosen ones, best first; -1 where there is none (`overflow: next_choice`)."""
    next_weight_TS: Tensor | None = None
    """float [T, S]: the weight each of them would have."""
    noise: Noise | None = None
    """What the smooth load needs of a noisy router."""
    num_zero_cost: int = 0
    """The last so many experts cost nothing: their choices are computed where the token is, have no queue, and travel nowhere."""
    physical_experts: int | None = None
    """What `expert_TK` counts on a journey, if not the router's experts: see `ownership.travelling`."""

    @property
    def num_physical_experts(self) -> int:
        """How many queues of rows there are: one for each expert, wherever it lives."""
        return self.score_TE.shape[1] if self.physical_experts is None else self.physical_experts

    @property
    def is_zero_cost_TK(self) -> Tensor:
        """bool: choices of experts that cost nothing."""
        return self.expert_TK >= self.score_TE.shape[1] - self.num_zero_cost


class Router(Protocol):
    """Chooses experts. An `nn.Module` or anything callable."""

    def __call__(self, x_TD: Tensor, context: TokenContext) -> Routing: ...
