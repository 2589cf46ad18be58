"""Expert-parallel dispatchers: all-to-all of tokens to the ranks of their experts, and back.

Packed sends only the rows that exist. Per layer, forward: counts (a few bytes), rows out, rows back
= 3 collectives and 1 host read (the split sizes); backward: 2 collectives. Bytes per rank and
direction: (rows for other ranks) * M * itemsize.

Padded sends C slots for each (group, expert). Forward 2 collectives, backward 2, no host read: all
shapes follow from the config. Bytes per rank and direction: (EP-1)/EP * E * G * C * M * itemsize.

Sorting, dropping and summing are shared with the local dispatchers (moe/dispatch.py).

Letters: T tokens, D width, M row width, E experts, e local experts (E/EP), K experts per token,
N rows sent, R rows received, P = EP ranks, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.copy_planner import CopyTotals
from dmoe.moe.dispatch import (
    Permutation,
    packed_permutation,
    padded_permutation,
    permute,
    profiled,
    unpermute,
)
from dmoe.moe.interfaces import RowCounts, TokensPerExpert
from dmoe.moe.routing import DispatchPlan


@dataclass
class CommTimer:
    """Time and bytes of one layer's all-to-alls, recomputed ones included. Off by default."""

    clock: Callable[[], float] | None = None
    """Returns seconds, after a device synchronisation on a GPU; None while the timer is off."""
    seconds: float = 0.0
    """Includes the time spent waiting for other ranks."""
    sent_bytes: int = 0
    """Sent to other ranks; rows that stay on this rank do not count."""
    copies: CopyTotals = field(default_factory=CopyTotals)

    def start(self, clock: Callable[[], float]) -> None:
        """Reset both sums and start measuring with `clock`."""
        self.clock, self.seconds, self.sent_bytes = clock, 0.0, 0
        self.copies = CopyTotals()

    def stop(self) -> None:
        """Stop measuring and keep the sums."""
        self.clock = None

    @contextmanager
    def measure(
        self, rows: Tensor, send_counts: list[int] | None, group: dist.ProcessGroup
    ) -> Iterator[None]:
        """Measure one all-to-all of `rows`, split by `send_counts` (None: equally)."""
        if self.clock is None:
            yield
            return
        if send_counts is None:
            local_rows = len(rows) // dist.get_world_size(group)
        else:
            local_rows = send_counts[dist.get_rank(group)]
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
        self.sent_bytes += (len(rows) - local_rows) * row_bytes
        start = self.clock()
        yield
        self.seconds += self.clock() - start


@dataclass(frozen=True)
class ExpertGroup:
    """One layer's all-to-all: its process group, an optional consistency check and a timer."""

    group: dist.ProcessGroup
    layer: int = 0
    checker: CollectiveChecker | None = None
    timer: CommTimer = field(default_factory=CommTimer)

    def all_to_all_autograd(
        self,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        operation: str,
    ) -> Tensor:
        """Run `all_to_all` (same arguments) with a gradient: the reverse all-to-all."""
        received: Tensor = _AllToAll.apply(rows, send_counts, recv_counts, operation, self)
        return received

    def all_to_all(
        self,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        operation: str,
    ) -> Tensor:
        """Run an all-to-all over dimension 0, without autograd.

        Args:
            rows: [N, ...].
            send_counts: rows for each rank, checked against `rows`; None: equal shares.
            recv_counts: rows from each rank; None: as many as are sent.
            operation: name for error messages and the consistency check.

        Returns:
            [R, ...], ordered by source rank.
        """
        assert send_counts is None or sum(send_counts) == len(rows), (
            f"{operation}: {len(rows)} rows, but {sum(send_counts or [])} to send"
        )
        if self.checker is not None:
            self.checker.compare(self.layer, operation, rows, send_counts, recv_counts)
        num_received = len(rows) if recv_counts is None else sum(recv_counts)
        received = rows.new_empty((num_received, *rows.shape[1:]))
        with profiled("exchange"), self.timer.measure(rows, send_counts, self.group):
            dist.all_to_all_single(
                received, rows.contiguous(), recv_counts, send_counts, group=self.group
            )
        return received


def comm_timers(model: nn.Module) -> list[CommTimer]:
    """List the timer of each MoE layer that uses an all-to-all; empty where EP = 1."""
    packed = [module.packed for module in model.modules() if isinstance(module, MoELayer)]
    return [each.expert_group.timer for each in packed if isinstance(each, PackedAllToAll)]


class _AllToAll(Function):
    """All-to-all of rows; the gradient takes the same route with the counts swapped."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        operation: str,
        expert_group: ExpertGroup,
    ) -> Tensor:
        ctx.send_counts, ctx.recv_counts = send_counts, recv_counts
        ctx.operation, ctx.expert_group = operation, expert_group
        return expert_group.all_to_all(rows, send_counts, recv_counts, operation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = ctx.expert_group.all_to_all(
            grads[0], ctx.recv_counts, ctx.send_counts, f"{ctx.operation} backward"
        )
        return grad, None, None, None, None


class _Reorder(Function):
    """`rows[order]` with a gather by the inverse as its backward, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_R: Tensor, *others: Tensor | None) -> Tensor:
        ctx.save_for_backward(*others)
        return _gathered(rows, order_R, None if others[1] is None else others[1][order_R])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _gathered(grads[0], *ctx.saved_tensors), None, None, None


def _gathered(rows: Tensor, order_R: Tensor, unused_R: Tensor | None) -> Tensor:
    out = rows.index_select(0, order_R)
    return out if unused_R is None else out.masked_fill_(unused_R.unsqueeze(1), 0.0)


def reorder(
    rows: Tensor, order_R: Tensor, inverse_R: Tensor, unused_R: Tensor | None = None
) -> Tensor:
    """Return `rows[order_R]`; `inverse_R` is the inverse permutation. Deterministic backward.

    `unused_R` marks rows of the input that are zero in the result, and get a gradient of zero.
    """
    out: Tensor = _Reorder.apply(rows, order_R, inverse_R, unused_R)
    return out


@dataclass(frozen=True)
class PackedDispatchMetadata:
    """State of one packed dispatch that `combine` needs."""

    permutation: Permutation
    send_counts: list[int]
    """Rows this rank sent to each rank of the group."""
    recv_counts: list[int]
    """Rows this rank received from each rank of the group."""
    order_R: Tensor
    """int64: order by source rank -> order by local expert."""
    inverse_R: Tensor
    """int64: the inverse of `order_R`."""


class PackedAllToAll:
    """Dispatcher that sends only the rows that exist; 1 host read per forward."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, RowCounts, PackedDispatchMetadata]:
        """Send each token to the ranks of its experts; see `moe.interfaces.Dispatcher`."""
        permutation, count_E = packed_permutation(plan)
        count_Pe = count_E.view(self.num_ranks, -1)
        recv_count_Pe = self.expert_group.all_to_all(count_Pe, None, None, "counts")
        counts = torch.stack([count_Pe.sum(1), recv_count_Pe.sum(1)])
        # The only host read: split sizes of an all-to-all are Python integers.
        send_counts, recv_counts = counts.tolist()

        permutation = permutation.first_rows(sum(send_counts))
        rows_ND = permute(x_TD, permutation)
        rows_RD = self.expert_group.all_to_all_autograd(
            rows_ND, send_counts, recv_counts, "dispatch"
        )
        order_R, inverse_R = local_expert_order(recv_count_Pe, sum(recv_counts))
        metadata = PackedDispatchMetadata(permutation, send_counts, recv_counts, order_R, inverse_R)
        return reorder(rows_RD, order_R, inverse_R), recv_count_Pe.sum(0), metadata

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PackedDispatchMetadata
    ) -> Tensor:
        """Return the rows to their tokens and sum them with their weights."""
        assert len(rows_RD) == sum(metadata.recv_counts), (
            f"experts returned {len(rows_RD)} rows for {sum(metadata.recv_counts)}"
        )
        rows_by_source_RD = reorder(rows_RD, metadata.inverse_R, metadata.order_R)
        rows_ND = self.expert_group.all_to_all_autograd(
            rows_by_source_RD, metadata.recv_counts, metadata.send_counts, "combine"
        )
        return unpermute(rows_ND, weight_TK, metadata.permutation)


def local_expert_order(recv_count_Pe: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Order from rows by (source rank, expert) to rows by (expert, source rank), and its inverse.

    Both are int64 [num_rows]. No host read.
    """
    num_ranks, num_experts = recv_count_Pe.shape
    expert_Pe = torch.arange(num_experts, device=recv_count_Pe.device).expand(num_ranks, -1)
    expert_R = expert_Pe.flatten().repeat_interleave(recv_count_Pe.flatten(), output_size=num_rows)
    order_R = expert_R.sort(stable=True).indices
    position_R = torch.arange(num_rows, device=order_R.device)
    return order_R, torch.empty_like(order_R).scatter_(0, order_R, position_R)


@dataclass(frozen=True)
class PaddedDispatchMetadata:
    """State of one padded dispatch that `combine` needs."""

    permutation: Permutation
    slots_per_expert: int
    """Rows that one rank sends to one expert: G * C."""


class PaddedAllToAll:
    """Dispatcher with fixed slots and equal splits: no counts, no host read."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, TokensPerExpert, PaddedDispatchMetadata]:
        """Send each token to the ranks of its experts; see `moe.interfaces.Dispatcher`."""
        assert plan.slots is not None, "the padded exchange needs a capacity"
        slots = plan.slots.rows_per_expert
        metadata = PaddedDispatchMetadata(padded_permutation(plan), slots)
        rows_RD = self.expert_group.all_to_all_autograd(
            permute(x_TD, metadata.permutation), None, None, "dispatch"
        )
        rows_PeCD = rows_RD.view(self.num_ranks, -1, slots, rows_RD.shape[1])
        return rows_PeCD.transpose(0, 1).flatten(0, 2), self.num_ranks * slots, metadata

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PaddedDispatchMetadata
    ) -> Tensor:
        """Return the rows to their tokens and sum them with their weights."""
        rows_ePCD = rows_RD.view(-1, self.num_ranks, metadata.slots_per_expert, rows_RD.shape[1])
        rows_ND = self.expert_group.all_to_all_autograd(
            rows_ePCD.transpose(0, 1).flatten(0, 2), None, None, "combine"
        )
        return unpermute(rows_ND, weight_TK, metadata.permutation)
