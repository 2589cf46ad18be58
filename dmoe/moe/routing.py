"""The records of one layer's forward, and the router protocol.

A forward passes three states, each a type of its own: `Routing` (the router's decision), then
`DispatchPlan` (which assignments are computed, after capacity), then the dispatcher's metadata.

Letters: T tokens on this rank in one micro-batch, D model width, E experts (global, zero-cost ones
included), K experts per token, S next experts per token, G groups that share a capacity, C slots of
one (group, expert), L MoE layers, V = E + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dmoe.moe.constants import IndexRanges
from dmoe.moe.inputs import CASTS, context_of_rows, input_error, transform_error

MetricsFn = Callable[["Routing", "DispatchPlan", "TokenContext"], dict[str, Tensor]]
"""Computes further metrics of one forward, by name: device tensors, without a host read."""


@dataclass(frozen=True)
class TokenContext:
    """Per-token inputs of a layer besides the vectors. Every field has a neutral default.

    Integers of any width become int64 here, and a mask of integers 0 and 1 becomes bool (which
    reads it on the host once): int32 overflows in a hash, uint8 in `label * K`. A layer accepts a
    field of one value per token in the shape of its input's tokens too, e.g. a mask [B, S].
    """

    valid_T: Tensor | None = None
    """bool; False marks padding, which is never routed and never counted. None: no padding. It may
    be filled again after the forward: the backward has a copy, `Routing.selected_TK` a view."""
    prior_count_LE: Tensor | None = None
    """int64; assignments of the step's earlier accumulation steps, of all ranks (global loss)."""
    token_id_T: Tensor | None = None
    """int64; token ids (hash routing)."""
    label_T: Tensor | None = None
    """int64; task, language or domain of each token (fixed routing)."""
    position_T: Tensor | None = None
    """int64; position of each token in its document, 0 at its first. Layers ignore it; attention
    ends there. None: each sequence is one document."""
    noise_key: tuple[int, int] | None = None
    """(seed, optimizer step): keys the router noise of this forward. Noisy routers need it in
    training."""
    first_sequence: int = 0
    """Index of this forward's first sequence in the global batch of the optimizer step. Part of the
    key of the noise, so that noise does not depend on how the batch is sharded over ranks."""
    given_expert_LTK: Tensor | None = None
    """int64; the experts of each token in every MoE layer, -1 where it selects fewer than K, in
    place of the router's choice (replay). None: the router chooses."""
    budget: float | None = None
    """Share of all experts' multiply-adds that a token may spend (budget routing). None: as
    configured."""
    metrics_fn: MetricsFn | None = None
    """Called by each layer after routing; its result is returned in `LayerStats.metrics`."""

    def __post_init__(self) -> None:
        for name, cast in CASTS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, cast(name, value))


EMPTY_CONTEXT = TokenContext()
"""No information about the tokens besides their vectors."""


@dataclass(frozen=True)
class BatchShape:
    """The quantities of one forward that follow from tensor shapes and the config alone."""

    sequences: int = 1
    """Number of equal sequences that the T tokens form."""
    groups: int = 1
    """Number G of equal, contiguous groups of tokens that share a capacity."""
    capacity: int | None = None
    """Slots C of one (group, expert). None: dropless."""


ONE_SEQUENCE = BatchShape()
"""One sequence, dropless: the shape of a router that is called outside a layer."""


@dataclass(frozen=True)
class Noise:
    """The noise of a noisy router's logits (Shazeer 2017, eq. 4)."""

    clean_TE: Tensor
    """float: logits before the noise."""
    std_TE: Tensor
    """float: standard deviation of each logit's noise."""
    raw_TE: Tensor | None = None
    """float: input of the softplus whose output is `std_TE`."""


@dataclass
class ChoiceCounts:
    """Counts of the choices of a routing before any drop, int64 [U, E] by the number U of units."""

    by_units: dict[int, Tensor] = field(default_factory=dict)
    copies_2V: Tensor | None = None
    """The counts of one unit twice, each with a 0 behind: memory for what a layer returns."""


@dataclass(frozen=True)
class Routing:
    """The router's decision: the experts of each token and their weights.

    An assignment is one (token, choice) pair, T*K of them.
    """

    expert_TK: Tensor
    """int64; expert ids in order of preference."""
    weight_TK: Tensor
    """float32 (float64 for a float64 model): combine weights; they carry the main loss's gradient
    to the router."""
    score_TE: Tensor
    """float32 or float64, non-negative: softmax or sigmoid of the logits, over all experts."""
    logit_TE: Tensor
    """float32 or float64."""
    scale: float = 1.0
    """Factor contained in `weight_TK`; kept when weights are renormalized after drops."""
    selected_TK: Tensor | None = None
    """bool; False where the token selects fewer than K experts or is padding. None: all True, which
    saves the dispatcher masks and a host sync."""
    next_expert_TS: Tensor | None = None
    """int64; the next eligible experts after the selected ones, best first; -1 where there is none
    (`overflow: next_choice`)."""
    next_weight_TS: Tensor | None = None
    """float; the combine weight that each of them would have."""
    noise: Noise | None = None
    """Set by noisy routers; read by the smooth load loss."""
    sums_to_one: bool = False
    """Whether each token's scores sum to 1, as a softmax does: losses need not normalize them."""

    counts: ChoiceCounts = field(default_factory=ChoiceCounts, init=False, repr=False)
    """Results of `choice_count`."""
    loss_logit_TE: Tensor | None = field(default=None, init=False, repr=False)
    """The logits again, where `score_TE` is their softmax (`load_balancing.auxiliary`)."""

    def with_loss_logits(self, logit_TE: Tensor | None) -> Routing:
        """Set `loss_logit_TE`; a copy by `replace` has none."""
        object.__setattr__(self, "loss_logit_TE", logit_TE)
        return self

    @property
    def num_experts(self) -> int:
        """E, zero-cost experts included."""
        return self.score_TE.shape[1]

    def choice_count(self, units: int = 1) -> Tensor:
        """Count each unit's assignments of each expert before any drop, int64 [U, E]; once."""
        found, ids_TK = self.counts.by_units, self.expert_TK
        if units not in found:
            found[units] = count_per_expert(ids_TK, self.selected_TK, units, self.num_experts)
        return found[units]

    @property
    def is_selected_TK(self) -> Tensor:
        """`selected_TK` as a tensor in any case."""
        return _mask_or_all(self.selected_TK, self.expert_TK)


@dataclass(frozen=True)
class ExpertSlots:
    """The slots of experts with a capacity."""

    position_TK: Tensor
    """int64; the place of each kept assignment in its (group, expert), 0, 1, ... without a gap."""
    capacity: int
    """Slots that this rank can fill in one (group, expert); pooled: in one (group, pool)."""
    groups: int
    """Number G of equal, contiguous groups of tokens that share a capacity."""
    offered: float
    """This rank's share of the slots of all experts: summed over the ranks, the global number."""
    pool: int = 1
    rows_per_rank: int = 0
    """Pooled: rows that this rank sends to each EP rank in the padded exchange."""

    @property
    def rows_per_expert(self) -> int:
        """G * C: rows that this rank sends to one expert (pool) in the padded exchange."""
        return self.groups * self.capacity


@dataclass(frozen=True)
class DispatchPlan:
    """The assignments that are computed: a routing after capacity. Read by dispatchers."""

    expert_TK: Tensor
    """int64 in [0, num_experts): the expert of each assignment, after rerouting (`next_choice`)."""
    weight_TK: Tensor
    """float32 or float64: combine weights; 0 for dropped assignments."""
    keep_TK: Tensor | None
    """bool; which assignments are computed. None: all, which saves masks and a host sync."""
    num_experts: int
    """Number of experts that `expert_TK` counts."""
    num_zero_cost: int = 0
    """Number of zero-cost experts (highest ids). Evaluated locally: no capacity, no dispatch."""
    slots: ExpertSlots | None = None
    """None: dropless."""
    ranges: IndexRanges = field(default_factory=IndexRanges, repr=False, compare=False)
    routed: tuple[Tensor, ChoiceCounts] | None = field(default=None, repr=False, compare=False)
    """`expert_TK` and `counts` of the routing; None: not known."""
    kernels: str = "torch"
    """`moe.kernels`: what moves the rows."""

    def note_counts(self, count_3V: Tensor) -> None:
        """Keep the counts of a sort as the routing's, which then makes no own.

        Only if it has sorted the choices of the routing: a plan with ids by rank or chunk, or with
        fewer assignments, counts others. `count_3V`: three times rows per expert, then of none.
        """
        if self.routed is not None and self.keep_TK is None:
            choice_TK, counts = self.routed
            if choice_TK is self.expert_TK and 1 not in counts.by_units:
                counts.by_units[1], counts.copies_2V = count_3V[:1, :-1], count_3V[1:]

    @property
    def is_kept_TK(self) -> Tensor:
        """`keep_TK` as a tensor in any case."""
        return _mask_or_all(self.keep_TK, self.expert_TK)

    @property
    def is_zero_cost_TK(self) -> Tensor:
        """bool: assignments of zero-cost experts."""
        return self.expert_TK >= self.num_experts - self.num_zero_cost


def flatten_tokens(x: Tensor, context: TokenContext, dim: int) -> tuple[Tensor, TokenContext]:
    """Return a layer's input as rows [T, D], padding zeroed, and a context of one value per row.

    Raises:
        ConfigError: what is allowed of `x` and of the context's fields (`inputs.py`); within a
            transform of torch.func.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise transform_error()
    if not (isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] == dim and x.is_floating_point()):
        raise input_error(x, dim)
    if context is not EMPTY_CONTEXT:
        context = context_of_rows(context, x.shape[:-1])
    return masked(x.flatten(0, -2), context.valid_T), context


def masked(value_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Set the rows of padding to 0, whatever they hold, and their gradients too.

    Selects: a product with a mask keeps a NaN or an infinity, because 0 x NaN is NaN.
    """
    return value_TX if valid_T is None else value_TX.masked_fill(~valid_T.unsqueeze(1), 0.0)


class Router(Protocol):
    """Selects the experts of each token. An `nn.Module` or any callable."""

    def __call__(self, x_TD: Tensor, context: TokenContext, shape: BatchShape) -> Routing: ...


def count_per_expert(
    expert_TK: Tensor, active_TK: Tensor | None, groups: int, num_experts: int
) -> Tensor:
    """Count the active assignments of each (group, expert).

    Uses integer atomics only, so it is deterministic.

    Args:
        expert_TK: int64 expert ids in [0, E).
        active_TK: bool or int64; assignments that count. None: all.
        groups: number G of equal, contiguous groups of tokens.
        num_experts: E.

    Returns:
        int64 [G, E].
    """
    queue_TK = expert_TK
    if groups > 1:
        group_T = group_of_token(len(expert_TK), groups, expert_TK.device)
        queue_TK = group_T.unsqueeze(1) * num_experts + expert_TK
    count_N = torch.zeros(groups * num_experts, dtype=torch.int64, device=expert_TK.device)
    one_N = (
        count_N.new_ones(expert_TK.numel())
        if active_TK is None
        else active_TK.flatten().to(torch.int64)
    )
    return count_N.scatter_add_(0, queue_TK.flatten(), one_N).view(groups, num_experts)


def group_of_token(tokens: int, groups: int, device: torch.device) -> Tensor:
    """Return the group of each token, int64 [T]: groups are equal, contiguous runs of tokens."""
    return torch.arange(tokens, device=device) // max(1, tokens // groups)


def _mask_or_all(mask_TK: Tensor | None, like_TK: Tensor) -> Tensor:
    return torch.ones_like(like_TK, dtype=torch.bool) if mask_TK is None else mask_TK
