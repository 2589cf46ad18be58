"""The packed exchange with copies for the step: the rows of hot experts are divided over ranks.

    counts     every rank's rows per expert, gathered over the EP group
    plan       all ranks compute the same one from them (moe/copy_planner.py)
    dispatch   rows are sent to the rank that computes them
    weights    of the copied experts, from their ranks to the copies; backward brings the copies'
               gradients back and adds them, in the order of the ranks
    combine    as without copies

Nothing is kept between forwards, so no copy is ever stale; a recomputed forward has the same counts
and so the same plan. Choices, drops and weights are those without copies; an expert's products are
only divided over ranks, so numbers are equal within rounding.

Cost of a layer: the gathered counts replace the all-to-all of the packed exchange's counts (8 E P
bytes per rank instead of 8 E), one host read as there; if the plan has copies, one all-to-all more
in forward and one in backward. Bytes, per direction and copy: the weights of one expert, in the
rows' dtype. Memory: the copies' weights until the backward of the layer.

Letters: T tokens, K experts per token, D width, E experts, e local experts, N rows sent, R rows
received, P = EP ranks, I instances (experts and copies of all ranks), i those of this rank, n
copies on this rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from dmoe.config.errors import ConfigError
from dmoe.distributed.all_to_all import (
    ExpertGroup,
    PackedAllToAll,
    PackedDispatchMetadata,
    local_expert_order,
    reorder,
)
from dmoe.moe.base_layer import MoELayer, forward_takes
from dmoe.moe.copy_planner import CopyPlan, CopyRule, plan_copies
from dmoe.moe.dispatch import Permutation, packed_permutation, permute
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import RowsWithCopies
from dmoe.moe.routing import DispatchPlan


class CopyingAllToAll(PackedAllToAll):
    """The packed dispatcher with copies for the step; 1 host read per forward."""

    def __init__(self, expert_group: ExpertGroup, rule: CopyRule) -> None:
        super().__init__(expert_group)
        self.rule, self.rank = rule, dist.get_rank(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, RowsWithCopies, PackedDispatchMetadata]:
        """Send each token to the ranks that compute its experts; see `moe.interfaces`."""
        permutation, count_E = packed_permutation(plan)
        count_PE = self.expert_group.all_to_all(
            count_E.expand(self.num_ranks, -1), None, None, "counts"
        )
        # The only host read: the plan, and the split sizes.
        copies = plan_copies(count_PE.cpu().numpy(), self.rule)
        first, last = copies.edge_P[self.rank : self.rank + 2]
        recv_count_Pi = copies.rows_PI[:, first:last]
        send_counts = np.add.reduceat(copies.rows_PI[self.rank], copies.edge_P[:-1]).tolist()
        recv_counts = recv_count_Pi.sum(1).tolist()
        if self.expert_group.timer.clock is not None:
            self.expert_group.timer.copies.add(copies, self.rank)

        permutation = permutation.first_rows(sum(send_counts))
        if copies.moves:
            permutation = by_instance(permutation, copies, self.rank)
        rows_RD = self.expert_group.all_to_all_autograd(
            permute(x_TD, permutation), send_counts, recv_counts, "dispatch"
        )
        recv_count = torch.from_numpy(recv_count_Pi).to(x_TD.device)
        order_R, inverse_R = local_expert_order(recv_count, sum(recv_counts))
        metadata = PackedDispatchMetadata(permutation, send_counts, recv_counts, order_R, inverse_R)
        rows_i = recv_count.sum(0)
        row_counts = RowsWithCopies(
            rows_i[: copies.per_rank],
            rows_i[copies.per_rank :],
            int(recv_count_Pi[:, : copies.per_rank].sum()),
            WeightExchange(self.expert_group, copies, self.rank),
        )
        return reorder(rows_RD, order_R, inverse_R), row_counts, metadata


def check_copies(layer: MoELayer, rule: CopyRule) -> None:
    """Refuse copies of a layer that has none to offer. Raises ConfigError."""
    value = "auto" if rule.slots is None else rule.slots
    if layer.padded is not None:
        why = "saves nothing with padded slots, of which every rank computes equally many"
        raise ConfigError("copies", value, why, "use exchange=packed")
    if not forward_takes(layer.experts, "takes_copies"):
        why = f"needs dmoe's own experts of one shape, not {type(layer.experts).__name__}"
        raise ConfigError("copies", value, why, "use 0")


def by_instance(permutation: Permutation, copies: CopyPlan, rank: int) -> Permutation:
    """Order the rows of this rank by instance: rows of one expert are divided in token order.

    `permutation` orders them by expert. No host read.
    """
    rows_N, sent_I = permutation.assignment_R, copies.rows_PI[rank]
    if len(rows_N) == 0:
        return permutation
    by_expert = np.argsort(copies.expert_I, kind="stable")
    start_I = np.empty_like(sent_I)
    start_I[by_expert] = np.cumsum(sent_I[by_expert]) - sent_I[by_expert]
    shift_I = torch.from_numpy(start_I - (np.cumsum(sent_I) - sent_I)).to(rows_N.device)
    counts_I = torch.from_numpy(np.ascontiguousarray(sent_I)).to(rows_N.device)
    position_N = torch.arange(len(rows_N), device=rows_N.device)
    order_N = position_N + shift_I.repeat_interleave(counts_I, output_size=len(rows_N))
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, position_N)
    return Permutation(
        rows_N[order_N], inverse_N[permutation.row_TK], permutation.keep_TK, permutation.filled_R
    )


class WeightExchange:
    """Sends the weights of copied experts, and brings the gradients of the copies back."""

    def __init__(self, expert_group: ExpertGroup, copies: CopyPlan, rank: int) -> None:
        self.expert_group, per_rank = expert_group, copies.per_rank
        own = range(rank * per_rank, (rank + 1) * per_rank)
        sent = [[e - own.start for e in experts if e in own] for experts in copies.copies]
        self.sent = [expert for experts in sent for expert in experts]
        """Local experts that this rank sends, in the order of the ranks they go to."""
        self.send_counts = [len(experts) for experts in sent]
        homes = [expert // per_rank for expert in copies.copies[rank]]
        self.recv_counts = [homes.count(home) for home in range(copies.ranks)]
        self.has_copies = bool(copies.moves)

    def __call__(self, stacks: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the stacks [e, ...] of this rank, and those of its copies [n, ...].

        The first are to be used in place of the argument: their gradient is the sum. Without a copy
        on any rank the second list is empty, and nothing is sent.
        """
        out: tuple[Tensor, ...] = _SendWeights.apply(self, *stacks)
        return list(out[: len(stacks)]), list(out[len(stacks) :])

    def send(self, stacks: tuple[Tensor, ...]) -> list[Tensor]:
        """Send the experts' matrices to their copies, in one all-to-all."""
        sizes = [math.prod(stack.shape[1:]) for stack in stacks]
        buffer = stacks[0].new_empty(len(self.sent), sum(sizes))
        for row, expert in zip(buffer, self.sent, strict=True):
            for part, stack in zip(row.split(sizes), stacks, strict=True):
                part.view(stack.shape[1:]).copy_(stack[expert])
        received = self._exchange(buffer, self.send_counts, self.recv_counts, "weights of copies")
        return _stacks(received, stacks)

    def add_gradients(self, own: list[Tensor], copied: list[Tensor]) -> None:
        """Send the gradients of the copies back, in one all-to-all, and add them to `own`."""
        buffer = torch.cat([grad.flatten(1) for grad in copied], 1)
        received = self._exchange(buffer, self.recv_counts, self.send_counts, "gradients of copies")
        for grad, back in zip(own, _stacks(received, own), strict=True):
            for expert, part in zip(self.sent, back, strict=True):
                grad[expert] += part

    def _exchange(self, buffer: Tensor, out: list[int], back: list[int], operation: str) -> Tensor:
        timer = self.expert_group.timer
        before = timer.sent_bytes
        received = self.expert_group.all_to_all(buffer, out, back, operation)
        timer.copies.sent_bytes += timer.sent_bytes - before
        return received


def _stacks(rows: Tensor, like: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Return the parts of rows, each in the shape of a stack; on the CPU views."""
    parts = rows.split([math.prod(stack.shape[1:]) for stack in like], 1)
    stacks = [part.unflatten(1, stack.shape[1:]) for part, stack in zip(parts, like, strict=True)]
    return [stack.contiguous() for stack in stacks] if rows.is_cuda else stacks


class _SendWeights(Function):
    """Stacks of the local experts -> the same, and those of the copies."""

    @staticmethod
    def forward(ctx: Any, exchange: WeightExchange, *stacks: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.num_stacks = exchange, len(stacks)
        return (*stacks, *(exchange.send(stacks) if exchange.has_copies else ()))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # added to in place: the experts' backward made them for this; an expanded one is copied
        own = [grad.clone() if 0 in grad.stride() else grad for grad in grads[: ctx.num_stacks]]
        copied = grads[ctx.num_stacks :]
        needed = ctx.needs_input_grad[1:]
        if copied:
            trained = [i for i, need in enumerate(needed) if need]
            ctx.exchange.add_gradients([own[i] for i in trained], [copied[i] for i in trained])
        return (None, *(grad if need else None for grad, need in zip(own, needed, strict=True)))
