"""Exchanges that run beside other work (`parallel.exchange.overlap`), with the same numbers.

                  while dispatch is under way          while combine is under way
    forward       first product of shared experts      their second product
    backward      weight gradients of the experts,     gradients of the second product
                  gradients of the first product

An exchange is two autograd nodes: `_Depart` starts it in forward and waits in backward, `_Arrive`
waits in forward and starts in backward. Autograd runs what was made last first, so work that a
layer does between the two in forward is done between the two in backward, on its own.

The experts' weight gradients are no node of their own (FSDP2 and DDP see a gradient when autograd
delivers it): their backward computes the rows' gradient first and gives it to `send_gradient`,
which starts the exchange at once; `_Arrive`, which comes after it, then has nothing to send.

Collectives, their order, host reads and bytes are those of the plain dispatchers. A rank without
rows starts and waits too. Memory: activated rows and gradients of hidden rows of all experts at a
time, 3 F numbers per row in the backward of a layer, where the plain one has those of one expert.

Letters: N rows sent, R rows received, D width, P = EP ranks, e local experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
from dmoe.distributed.exchange.two_level import TwoLevelGroup
from dmoe.distributed.padded_all_to_all import PaddedAllToAll, PaddedDispatchMetadata, swapped
from dmoe.moe.dispatch import Permutation, permute, profiled, unpermute
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import Arrived, ExpertLayer, OverlappingDispatcher
from dmoe.moe.layer import MoE
from dmoe.moe.routing import DispatchPlan

Arrange = Callable[[Tensor], Tensor]


class RowExchange:
    """One exchange of rows: what is under way, in forward and then in backward.

    Args:
        expert_group: the ranks.
        send_counts, recv_counts, operation: see `ExpertGroup.all_to_all`.
    """

    def __init__(
        self,
        expert_group: ExpertGroup,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        operation: str,
    ) -> None:
        self.expert_group, self.operation = expert_group, operation
        self.send_counts, self.recv_counts = send_counts, recv_counts
        self.under_way: tuple[Tensor, Tensor, dist.Work | None] | None = None
        self.sent: tuple[Tensor, int] | None = None
        """The gradient that `send_gradient` was given, and its version."""
        self.arrange_back: Arrange = unchanged
        self.dtype = torch.float32
        """That of the rows, which `depart` sets."""

    def depart(
        self, rows_ND: Tensor, arrange: Arrange | None = None, arrange_back: Arrange | None = None
    ) -> Tensor:
        """Start the exchange of rows, brought into another order first, as in `arrive`.

        Returns what `arrive` takes.
        """
        departed: Tensor = _Depart.apply(rows_ND, self, arrange or unchanged, arrange_back)
        return departed

    def arrive(self, departed: Tensor, arrange: Arrange, arrange_back: Arrange) -> Tensor:
        """Wait for the rows and return them in another order.

        Args:
            departed: result of `depart`.
            arrange: rows by source rank -> rows in the result's order.
            arrange_back: its inverse, for gradients; both without autograd.
        """
        self.arrange_back = arrange_back
        arrived: Tensor = _Arrive.apply(departed, self, arrange)
        return arrived

    def send_gradient(self, grad_RD: Tensor) -> None:
        """Start to send the gradient of the arrived rows back."""
        self.start(self.arrange_back(grad_RD), backward=True)
        self.sent = grad_RD, grad_RD._version

    def start(self, rows: Tensor, *, backward: bool = False) -> Tensor:
        """Start to send `rows`; return the memory of what will be received."""
        assert self.under_way is None, f"{self.operation} is under way already"
        counts, name = (self.send_counts, self.recv_counts), self.operation
        if backward:
            counts, name = (self.recv_counts, self.send_counts), f"{name} backward"
        sent = self.expert_group.on_wire(rows)
        received, work = self.expert_group.start(sent, *counts, name)
        self.under_way = received, sent, work
        return received

    def wait(self) -> Tensor:
        """Wait for what was started, and return it in the rows' dtype."""
        assert self.under_way is not None, f"{self.operation} was not started"
        (received, _, work), self.under_way = self.under_way, None
        with profiled("exchange"), self.expert_group.timer.waiting():
            if work is not None:
                work.wait()
        return received.to(self.dtype)

    def check_sent(self, grad_RD: Tensor) -> bool:
        """Return whether this gradient is sent already, and forget it.

        Raises:
            RuntimeError: another one was sent: not the experts alone have used their rows.
        """
        if self.sent is None:
            return False
        (sent, version), self.sent = self.sent, None
        is_same = sent is grad_RD or sent.data_ptr() == grad_RD.data_ptr()
        if not is_same or version != grad_RD._version:
            raise RuntimeError(
                "the rows of the experts have another gradient than the one that was sent, so"
                " something besides the experts uses them, e.g. a hook: set"
                " parallel.exchange.overlap=false"
            )
        return True


def unchanged(rows: Tensor) -> Tensor:
    """Return the rows as they are."""
    return rows


class _Depart(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        exchange: RowExchange,
        arrange: Arrange,
        arrange_back: Arrange | None,
    ) -> Tensor:
        ctx.exchange, exchange.dtype = exchange, rows_ND.dtype
        ctx.arrange_back = arrange_back or unchanged
        return exchange.start(arrange(rows_ND))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        # the argument stands for the exchange: `_Arrive` has started it
        return ctx.arrange_back(ctx.exchange.wait()), None, None, None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, departed: Tensor, exchange: RowExchange, arrange: Arrange) -> Tensor:
        ctx.exchange, ctx.like = exchange, (departed.shape, departed.dtype)
        return arrange(exchange.wait())

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        exchange: RowExchange = ctx.exchange
        if not exchange.check_sent(grads[0]):
            exchange.start(exchange.arrange_back(grads[0]), backward=True)
        shape, dtype = ctx.like
        # without memory: nothing reads it
        return grads[0].new_zeros((), dtype=dtype).expand(shape), None, None


class OverlappedPacked(PackedAllToAll, OverlappingDispatcher):
    """The packed dispatcher, whose exchanges can be waited for later."""

    def start_dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Callable[[], Arrived]:
        """Start `dispatch`; the order of the rows is computed while they are under way."""
        permutation, recv_count_Pe, send_counts, recv_counts = self.count(plan)
        exchange = RowExchange(self.expert_group, send_counts, recv_counts, "dispatch")
        departed = exchange.depart(permute(x_TD, permutation))
        order_R, inverse_R = local_expert_order(recv_count_Pe, sum(recv_counts))
        metadata = PackedDispatchMetadata(permutation, send_counts, recv_counts, order_R, inverse_R)

        def arrive() -> Arrived:
            orders = (partial(gathered, order_R), partial(gathered, inverse_R))
            rows_RD = exchange.arrive(departed, *orders)
            return Arrived(rows_RD, recv_count_Pe.sum(0), metadata, exchange.send_gradient)

        return arrive

    def start_combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PackedDispatchMetadata
    ) -> Callable[[], Tensor]:
        """Start `combine`."""
        rows_by_source_RD = reorder(rows_RD, metadata.inverse_R, metadata.order_R)
        counts = (metadata.recv_counts, metadata.send_counts)
        exchange = RowExchange(self.expert_group, *counts, "combine")
        return _returning(exchange, rows_by_source_RD, weight_TK, metadata.permutation)


class OverlappedPadded(PaddedAllToAll, OverlappingDispatcher):
    """The padded dispatcher, whose exchanges can be waited for later."""

    def start_dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Callable[[], Arrived]:
        """Start `dispatch`."""
        metadata, rows = self.place(plan)
        exchange = RowExchange(self.expert_group, None, None, "dispatch")
        departed = exchange.depart(permute(x_TD, metadata.permutation))

        def arrive() -> Arrived:
            orders = (partial(swapped, metadata.by_rank), partial(swapped, metadata.by_expert))
            rows_RD = exchange.arrive(departed, *orders)
            return Arrived(rows_RD, rows, metadata, exchange.send_gradient)

        return arrive

    def start_combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PaddedDispatchMetadata
    ) -> Callable[[], Tensor]:
        """Start `combine`."""
        exchange = RowExchange(self.expert_group, None, None, "combine")
        rows_by_source_RD = swapped(metadata.by_expert, rows_RD)
        return _returning(exchange, rows_by_source_RD, weight_TK, metadata.permutation)


def _returning(
    exchange: RowExchange, rows_RD: Tensor, weight_TK: Tensor, permutation: Permutation
) -> Callable[[], Tensor]:
    """Start to return the rows; the result waits for them and sums each token's."""
    departed = exchange.depart(rows_RD)
    return lambda: unpermute(
        exchange.arrive(departed, unchanged, unchanged), weight_TK, permutation
    )


def gathered(order_R: Tensor, rows: Tensor) -> Tensor:
    """Return the rows in an order."""
    return rows.index_select(0, order_R)


def check_overlap(layer: ExpertLayer) -> None:
    """Refuse a layer whose exchange cannot run beside other work. Raises ConfigError."""
    why = None
    if not isinstance(layer, MoE):
        why = f"needs dmoe's own MoE layers, not {type(layer).__name__}"
    elif layer.capacity.pool > 1:
        why = "does not work with pooled slots (moe.capacity.pool)"
    elif type(layer.packed) is not PackedAllToAll:
        why = "does not work with copies for the step (parallel.placement.copies)"
    elif isinstance(getattr(layer.packed, "expert_group", None), TwoLevelGroup):
        why = "does not work with two levels, whose second step waits for the first"
    if why is not None:
        raise ConfigError("parallel.exchange.overlap", True, why, "use false")
