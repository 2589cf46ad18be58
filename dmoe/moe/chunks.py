"""Rows that arrive at the experts in chunks, so that experts compute while others are sent.

A chunk has all rows of some of the local experts (`parallel.exchange.chunks`). So every expert
computes its rows at once, in the same order as without chunks, and no number changes.

The experts are called once for all chunks: FSDP2 gathers and shards their weights around one call.

Letters: R rows of a chunk, D input width, M output width, e local experts, n chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.moe.interfaces import Arrived, TokensPerExpert
from dmoe.moe.routing import DispatchPlan

Weights = Mapping[str, Tensor]
SendGradient = Callable[[Tensor], None]


class RowChunk(NamedTuple):
    """One chunk on its way."""

    departed: Tensor
    """What `arrive` takes."""
    arrive: Callable[[Tensor], Arrived]
    """Wait for the rows."""
    leave: Callable[[Tensor], Tensor]
    """Start to return the experts' output rows_RM; returns what has departed."""


@dataclass(frozen=True)
class RowChunks:
    """The chunks of a forward, in place of rows per expert; the rows are what has departed."""

    chunks: Sequence[RowChunk]
    per_chunk: int
    """e / n."""
    dtype: torch.dtype
    """That of the arrived rows."""
    sends_gradient: bool
    """Whether a gradient leaves before the weights' gradients of its chunk are computed."""
    recompute: bool = False
    """Keep the arrived rows alone for backward (`train.recompute=experts`)."""

    def compute(
        self,
        function: Callable[[SendGradient | None, Weights, Tensor, TokensPerExpert], Tensor],
        weights: Weights,
        departed: Sequence[Tensor],
    ) -> list[Tensor]:
        """Compute each chunk once it has arrived, and start to return it.

        Args:
            function: takes what sends the rows' gradient, stacks of experts, their rows, and rows
                per expert; computes rows_RM.
            weights: stacks of the local experts by name, each [e, ...]; computed in the rows'
                dtype.
            departed: of each chunk, as arguments of the experts: FSDP2 reduces the weights'
                gradients once those of its arguments are there.

        Returns:
            What has departed of each chunk.
        """
        # one backward for all parts, which joins their gradients
        stacks = [stack.to(self.dtype) for stack in weights.values()]
        parts = zip(*(stack.split(self.per_chunk) for stack in stacks), strict=True)
        returning = []
        for chunk, tensor, part in zip(self.chunks, departed, parts, strict=True):
            rows_RD, row_counts, _, send_gradient = chunk.arrive(tensor)
            sends = send_gradient if self.sends_gradient else None
            call: Any = partial(function, sends, dict(zip(weights, part, strict=True)))
            if self.recompute and torch.is_grad_enabled():
                call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
            returning.append(chunk.leave(call(rows_RD, row_counts)))
        return returning


class ChunkingDispatcher:
    """A `Dispatcher` that sends rows in chunks of local experts, one after the other."""

    overlaps = False
    """Whether other work runs beside its exchanges as well (`parallel.exchange.overlap`)."""

    def start_chunks(
        self, x_TD: Tensor, plan: DispatchPlan, recompute: bool
    ) -> tuple[RowChunks, Any]:
        """Start to send all chunks, in order. Returns them and what `finish` needs."""
        raise NotImplementedError

    def finish(self, returning: Sequence[Tensor], weight_TK: Tensor, metadata: Any) -> Tensor:
        """Wait for the returned chunks, and sum each token's rows with their weights, y_TM."""
        raise NotImplementedError
