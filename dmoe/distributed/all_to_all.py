"""The two exchanges: tokens to the ranks of their experts, and back.

Packed moves exactly the rows there are. One layer, forward: counts (tiny), rows out, rows back = 3 collectives and 1 host sync (the
split sizes); backward: 2 collectives. Bytes a rank, each way: (rows for other ranks) * M * itemsize.
Padded moves C slots for each (group, expert). Forward 2 collectives, backward 2, no host sync: every shape is known from the config.
Bytes a rank, each way: (EP-1)/EP * E * G * C * M * itemsize.

Sorting, dropping and summing are the local dispatchers' (moe/dispatch.py); here is only the journey.

Letters: T tokens here, D width, E experts, e experts here (E/EP), K experts a token, R rows received, P = EP ranks, G groups, C slots.

What a layer's exchanges take, for whoever measures a step: seconds inside the all-to-alls, and bytes that leave this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from dmoe.distributed.collective_check import CollectiveChecker
from dmoe.moe.dispatch import (
    Permutation,
    TokensPerExpert,
    packed_permutation,
    padded_permutation,
    permute,
    unpermute,
)
from dmoe.moe.layer import MoE
from dmoe.moe.profiling import profiled
from dmoe.moe.routing import Routing

IDLE: AbstractContextManager[None] = nullcontext()


@dataclass
class CommTimer:
    """Stands still until it is given a clock. Counts forward and backward, and what is computed again, alike: it is what happened."""

    clock: Callable[[], float] | None = None
    """Seconds. On an accelerator it must wait for the device, or the time of the exchange would fall to whoever waits next."""
    seconds: float = 0.0
    """Waiting for the other ranks included: that is what an exchange costs the step."""
    sent_bytes: int = 0
    """To other ranks; what a rank sends to itself does not travel."""

    def start(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.sent_bytes = clock, 0.0, 0

    def stop(self) -> None:
        self.clock = None

    def measure(
        self, rows: Tensor, send: list[int] | None, group: dist.ProcessGroup
    ) -> AbstractContextManager[None]:
        """Around one exchange of `rows`, split as `send` says (None: equally)."""
        return IDLE if self.clock is None else self._measured(self.clock, rows, send, group)

    @contextmanager
    def _measured(
        self,
        clock: Callable[[], float],
        rows: Tensor,
        send: list[int] | None,
        group: dist.ProcessGroup,
    ) -> Iterator[None]:
        staying = (
            len(rows) // dist.get_world_size(group) if send is None else send[dist.get_rank(group)]
        )
        self.sent_bytes += (len(rows) - staying) * math.prod(rows.shape[1:]) * rows.element_size()
        began = clock()
        yield
        self.seconds += clock() - began


@dataclass(frozen=True)
class ExpertGroup:
    """The journey of one layer's rows: over which ranks, who watches it, and what it takes."""

    group: dist.ProcessGroup
    layer: int = 0
    checker: CollectiveChecker | None = None
    timer: CommTimer = field(default_factory=CommTimer)

    def all_to_all_autograd(
        self, rows: Tensor, send_counts: list[int] | None, recv_counts: list[int] | None, operation: str
    ) -> Tensor:
        """All-to-all of the leading dimension; `None` splits it equally. Its gradient is the same exchange with the lists swapped."""
        out: Tensor = _AllToAll.apply(rows, send_counts, recv_counts, operation, self)
        return out

    def all_to_all(
        self, rows: Tensor, send_counts: list[int] | None, recv_counts: list[int] | None, operation: str
    ) -> Tensor:
        """The exchange itself, without autograd. The lists are checked against the rows on every rank, in any mode."""
        assert send_counts is None or sum(send_counts) == len(rows), (
            f"{operation}: {len(rows)} rows, but {sum(send_counts or [])} to send"
        )
        if self.checker is not None:
            self.checker.compare(self.layer, operation, rows, send_counts, recv_counts)
        received = rows.new_empty((len(rows) if recv_counts is None else sum(recv_counts), *rows.shape[1:]))
        with profiled("exchange"), self.timer.measure(rows, send_counts, self.group):
            dist.all_to_all_single(received, rows.contiguous(), recv_counts, send_counts, group=self.group)
        return received


def comm_timers(model: nn.Module) -> list[CommTimer]:
    """The meter of each MoE layer whose rows travel; none where every rank has all experts."""
    dispatchers = [module.packed for module in model.modules() if isinstance(module, MoE)]
    return [
        dispatcher.expert_group.timer
        for dispatcher in dispatchers
        if isinstance(dispatcher, PackedAllToAll)
    ]


class _AllToAll(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        send: list[int] | None,
        receive: list[int] | None,
        operation: str,
        expert_group: ExpertGroup,
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.operation, ctx.expert_group = (
            send,
            receive,
            operation,
            expert_group,
        )
        return expert_group.all_to_all(rows, send, receive, operation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return (
            ctx.expert_group.all_to_all(
                grads[0], ctx.receive, ctx.send, f"{ctx.operation} backward"
            ),
            None,
            None,
            None,
            None,
        )


class _Reorder(Function):
    """`rows[order]` whose backward is the gather by the inverse, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R, inverse_R)
        return rows.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, inverse_R = ctx.saved_tensors
        return grads[0].index_select(0, inverse_R), None, None


def reorder(rows: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    out: Tensor = _Reorder.apply(rows, order_R, inverse_R)
    return out


@dataclass(frozen=True)
class PackedDispatchMetadata:
    permutation: Permutation
    send_counts: list[int]
    """Rows this rank sent to each rank of the exchange group."""
    recv_counts: list[int]
    order_R: Tensor
    """Arrival order (by source rank) -> order by local expert."""
    inverse_R: Tensor


class PackedAllToAll:
    """Exactly the rows there are."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, routing: Routing
    ) -> tuple[Tensor, TokensPerExpert, PackedDispatchMetadata]:
        permutation, count_E = packed_permutation(routing)
        count_Pe = count_E.view(self.num_ranks, -1)
        arriving_Pe = self.expert_group.all_to_all(count_Pe, None, None, "counts")
        send, receive = torch.stack(
            [count_Pe.sum(1), arriving_Pe.sum(1)]
        ).tolist()  # the one host sync

        rows_ND = permute(x_TD, permutation.first_rows(sum(send)))
        rows_RD = self.expert_group.all_to_all_autograd(rows_ND, send, receive, "dispatch")
        order_R, inverse_R = local_expert_order(arriving_Pe, sum(receive))
        metadata = PackedDispatchMetadata(
            permutation.first_rows(sum(send)), send, receive, order_R, inverse_R
        )
        return reorder(rows_RD, order_R, inverse_R), arriving_Pe.sum(0), metadata

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PackedDispatchMetadata
    ) -> Tensor:
        assert len(rows_RD) == sum(metadata.recv_counts), (
            f"experts returned {len(rows_RD)} rows for {sum(metadata.recv_counts)}"
        )
        arrival_RD = reorder(rows_RD, metadata.inverse_R, metadata.order_R)
        rows_ND = self.expert_group.all_to_all_autograd(
            arrival_RD, metadata.recv_counts, metadata.send_counts, "combine"
        )
        return unpermute(rows_ND, weight_TK, metadata.permutation)


def local_expert_order(arriving_Pe: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order that turns rows sorted by (source rank, expert) into (expert, source rank), and its inverse. No host sync."""
    ranks, experts = arriving_Pe.shape
    expert_Pe = torch.arange(experts, device=arriving_Pe.device).expand(ranks, experts)
    expert_R = expert_Pe.flatten().repeat_interleave(arriving_Pe.flatten(), output_size=rows)
    order_R = expert_R.sort(stable=True).indices
    inverse_R = torch.empty_like(order_R).scatter_(
        0, order_R, torch.arange(rows, device=order_R.device)
    )
    return order_R, inverse_R


@dataclass(frozen=True)
class PaddedDispatchMetadata:
    permutation: Permutation
    slots_per_expert: int
    """Rows one rank sends to one expert: G * C."""


class PaddedAllToAll:
    """Fixed slots, equal splits, no counts."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, routing: Routing
    ) -> tuple[Tensor, TokensPerExpert, PaddedDispatchMetadata]:
        assert routing.capacity is not None, "the padded exchange needs a capacity"
        metadata = PaddedDispatchMetadata(
            padded_permutation(routing), routing.groups * routing.capacity
        )
        rows_RD = self.expert_group.all_to_all_autograd(
            permute(x_TD, metadata.permutation), None, None, "dispatch"
        )
        by_rank = rows_RD.view(self.num_ranks, -1, metadata.slots_per_expert, rows_RD.shape[1])
        return by_rank.transpose(0, 1).flatten(0, 2), self.num_ranks * metadata.slots_per_expert, metadata

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PaddedDispatchMetadata
    ) -> Tensor:
        by_expert = rows_RD.view(-1, self.num_ranks, metadata.slots_per_expert, rows_RD.shape[1])
        rows_ED = self.expert_group.all_to_all_autograd(
            by_expert.transpose(0, 1).flatten(0, 2), None, None, "combine"
        )
        return unpermute(rows_ED, weight_TK, metadata.permutation)
