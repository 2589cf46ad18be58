"""The all-to-all of tokens to the ranks of their experts and back, and the packed dispatcher.

Packed sends only the rows that exist. Per layer, forward: counts (a few bytes), rows out, rows back
= 3 collectives and 1 host read (the split sizes); backward: 2 collectives. Bytes per rank and
direction: (rows for other ranks) * M * itemsize.

Sorting, dropping and summing are shared with the local dispatchers (moe/dispatch.py). Dispatchers
with fixed slots are in `padded_all_to_all.py`.

Letters: T tokens, D width, M row width, E experts, e local experts (E/EP), K experts per token,
N rows sent, R rows received, P = EP ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.distributed.exchange.comm_timer import CommTimer
from dmoe.moe.dispatch import (
    Permutation,
    packed_permutation,
    permute,
    profiled,
    unpermute,
)
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import RowCounts, RowDispatcher, SentRows
from dmoe.moe.routing import DispatchPlan


@dataclass(frozen=True)
class ExpertGroup:
    """One layer's all-to-all: its process group, an optional consistency check and a timer."""

    group: dist.ProcessGroup
    layer: int = 0
    checker: CollectiveChecker | None = None
    timer: CommTimer = field(default_factory=CommTimer)
    wire: torch.dtype | None = None
    """Dtype in which rows and their gradients are sent (`parallel.exchange.wire`). None: theirs."""

    def on_wire(self, rows: Tensor) -> Tensor:
        """Return rows as they are sent, contiguous."""
        return rows.to(rows.dtype if self.wire is None else self.wire).contiguous()

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
        return self.start(rows, send_counts, recv_counts, operation, wait=True)[0]

    def exchange_counts(self, count_PX: Tensor) -> tuple[Tensor, Tensor | None]:
        """Exchange numbers for each rank. One all-to-all; two levels: two.

        Returns:
            Those from each rank, [P, X], and what `splits` needs to read besides, [P, X] or None.
        """
        return self.all_to_all(count_PX, None, None, "counts"), None

    def splits(self, read: list[list[int]]) -> tuple[list[int], list[int]]:
        """Return rows to send and to receive from what the host has read: sums over X.

        Those of `count_PX` first, then those of both results of `exchange_counts`.
        """
        return read[0], read[1]

    def start(
        self,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        operation: str,
        *,
        wait: bool = False,
    ) -> tuple[Tensor, dist.Work | None]:
        """Start an all-to-all; `all_to_all` has the arguments.

        Returns:
            What is received, not before the work is waited for, and the work; None if it is done.
        """
        assert send_counts is None or sum(send_counts) == len(rows), (
            f"{operation}: {len(rows)} rows, but {sum(send_counts or [])} to send"
        )
        if self.checker is not None:
            self.checker.compare(self.layer, operation, rows, send_counts, recv_counts)
        num_received = len(rows) if recv_counts is None else sum(recv_counts)
        received = rows.new_empty((num_received, *rows.shape[1:]))
        with profiled("exchange"), self.timer.measure(rows, send_counts, self.group):
            more: dict[str, Any] = {} if wait else {"async_op": True}
            work = dist.all_to_all_single(
                received, rows.contiguous(), recv_counts, send_counts, group=self.group, **more
            )
        return received, work


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
        received = expert_group.all_to_all(
            expert_group.on_wire(rows), send_counts, recv_counts, operation
        )
        return received.to(rows.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        group: ExpertGroup = ctx.expert_group
        grad = group.all_to_all(
            group.on_wire(grads[0]), ctx.recv_counts, ctx.send_counts, f"{ctx.operation} backward"
        )
        return grad.to(grads[0].dtype), None, None, None, None


class _Reorder(Function):
    """`rows[order]` with a gather by the inverse as its backward, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_R: Tensor, *others: Tensor | None) -> Tensor:
        ctx.save_for_backward(*others)
        return _gathered(rows, order_R, None if others[1] is None else others[1][order_R])

    @staticmethod
    @first_derivative_only
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

    def check(self, rows: Tensor) -> None:
        """Assert that the experts return as many rows as they were given."""
        expected = sum(self.recv_counts)
        assert len(rows) == expected, f"experts returned {len(rows)} rows for {expected}"


class PackedAllToAll(RowDispatcher):
    """Dispatcher that sends only the rows that exist; 1 host read per forward."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, RowCounts, PackedDispatchMetadata]:
        """Send each token to the ranks of its experts; see `moe.interfaces.Dispatcher`."""
        rows_RD, order_R, count_e, metadata = self.send_rows(x_TD, plan)
        return reorder(rows_RD, order_R, metadata.inverse_R), count_e, metadata

    def send_rows(self, x_TD: Tensor, plan: DispatchPlan) -> SentRows:
        """Send them, without a pass that groups them by expert."""
        permutation, recv_count_Pe, send_counts, recv_counts = self.count(plan)
        rows_RD = self.expert_group.all_to_all_autograd(
            permute(x_TD, permutation), send_counts, recv_counts, "dispatch"
        )
        order_R, inverse_R = local_expert_order(recv_count_Pe, sum(recv_counts))
        metadata = PackedDispatchMetadata(permutation, send_counts, recv_counts, order_R, inverse_R)
        return SentRows(rows_RD, order_R, recv_count_Pe.sum(0), metadata)

    def count(self, plan: DispatchPlan) -> tuple[Permutation, Tensor, list[int], list[int]]:
        """Exchange the rows per expert: one all-to-all, one host read.

        Returns:
            The permutation of the rows to send, the rows of each source rank for each local expert,
            and the rows to send to and to receive from each rank.
        """
        permutation, count_E = packed_permutation(plan)
        count_Pe = count_E.view(self.num_ranks, -1)
        recv_count_Pe, more_Pe = self.expert_group.exchange_counts(count_Pe)
        counts = [count_Pe, recv_count_Pe] + ([] if more_Pe is None else [more_Pe])
        # The only host read: split sizes of an all-to-all are Python integers.
        read = torch.stack([count.sum(1) for count in counts]).tolist()
        send_counts, recv_counts = self.expert_group.splits(read)
        permutation = permutation.first_rows(sum(send_counts))
        return permutation, recv_count_Pe, send_counts, recv_counts

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PackedDispatchMetadata
    ) -> Tensor:
        """Return the rows to their tokens and sum them with their weights."""
        metadata.check(rows_RD)
        rows_by_source_RD = reorder(rows_RD, metadata.inverse_R, metadata.order_R)
        return self.return_rows(rows_by_source_RD, weight_TK, metadata)

    def return_rows(
        self, rows_RM: Tensor, weight_TK: Tensor, metadata: PackedDispatchMetadata
    ) -> Tensor:
        """Return rows that are in the order of their source ranks, and sum them."""
        metadata.check(rows_RM)
        rows_NM = self.expert_group.all_to_all_autograd(
            rows_RM, metadata.recv_counts, metadata.send_counts, "combine"
        )
        return unpermute(rows_NM, weight_TK, metadata.permutation)


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
