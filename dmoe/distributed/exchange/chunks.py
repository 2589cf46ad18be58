"""Exchanges in chunks of local experts (`parallel.exchange.chunks`), with the same numbers.

                             rows on their way
    dispatch     |1|2|3|4|
    experts        |1 |2 |3 |4 |          the gradients in backward likewise, the last chunk first
    combine           |1 |2 |3 |4|

Chunk i has the rows of the i-th e/n experts of every rank: all rows of an expert, by source rank
and token, as without chunks. Tutel (Hwang et al. 2023) and FasterMoE (He et al. 2022) divide the
tokens instead, which works with one expert per rank too; but then the gradient of a weight is a sum
over chunks, in another order, and each expert computes n products of an n-th of its rows.

Packed and padded. The rows are sorted once, by chunk, rank and expert, so that a chunk is one block
of them. All chunks depart at the start, in order; what arrives first is computed first, and departs
again (`RowExchange`, as with `overlap`).

Cost: forward 1 + 2n collectives (packed) or 2n (padded), backward 2n; the host read and the bytes
of the plain exchange. One copy more of the rows in forward and backward, where the parts are joined
again, and one of the weights' gradients. Letters: N rows sent, R rows of a chunk received, D width,
P = EP ranks, E experts, e local experts, n chunks, s = e/n experts of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.distributed.all_to_all import (
    ExpertGroup,
    PackedAllToAll,
    local_expert_order,
)
from dmoe.distributed.exchange.overlap import Arrange, RowExchange, gathered, unchanged
from dmoe.distributed.exchange.two_level import TwoLevelGroup
from dmoe.distributed.padded_all_to_all import PaddedAllToAll, swapped
from dmoe.moe.base_layer import forward_takes
from dmoe.moe.chunks import ChunkingDispatcher, RowChunk, RowChunks
from dmoe.moe.dispatch import (
    Permutation,
    packed_permutation,
    permute,
    unpermute,
)
from dmoe.moe.interfaces import Arrived, ExpertLayer, TokensPerExpert
from dmoe.moe.layer import MoE
from dmoe.moe.routing import DispatchPlan


class Route(NamedTuple):
    """One chunk: what is sent, and in which order experts have it."""

    send_counts: list[int] | None
    """Rows for each rank; None: equal shares."""
    recv_counts: list[int] | None
    row_counts: TokensPerExpert
    arrange: Arrange
    """Rows by source rank -> by expert."""
    arrange_back: Arrange


class _Chunking(ChunkingDispatcher):
    """The common part of packed and padded.

    Args:
        expert_group: the ranks.
        chunks: n.
        overlaps: `parallel.exchange.overlap`.
    """

    expert_group: ExpertGroup
    num_ranks: int

    def __init__(self, expert_group: ExpertGroup, chunks: int, overlaps: bool) -> None:
        super().__init__(expert_group)  # type: ignore[call-arg]
        self.chunks, self.overlaps = chunks, overlaps

    def route(self, plan: DispatchPlan) -> tuple[Permutation, list[Route]]:
        """Return the permutation of the rows to send, and the route of each chunk."""
        raise NotImplementedError

    def start_chunks(
        self, x_TD: Tensor, plan: DispatchPlan, recompute: bool
    ) -> tuple[RowChunks, tuple[Permutation, list[RowExchange]]]:
        """Start to send all chunks, in order."""
        permutation, routes = self.route(in_order_of_chunks(plan, self.num_ranks, self.chunks))
        rows_ND = permute(x_TD, permutation)
        sizes = [
            len(rows_ND) // self.chunks if route.send_counts is None else sum(route.send_counts)
            for route in routes
        ]
        # one backward for all parts, which joins their gradients
        parts = rows_ND.split(sizes)
        chunks, returns = list[RowChunk](), list[RowExchange]()
        for n, (rows, route) in enumerate(zip(parts, routes, strict=True), 1):
            there, back = (
                RowExchange(self.expert_group, *counts, f"{name} {n} of {self.chunks}")
                for name, counts in (
                    ("dispatch", (route.send_counts, route.recv_counts)),
                    ("combine", (route.recv_counts, route.send_counts)),
                )
            )
            returns.append(back)
            chunks.append(
                RowChunk(
                    there.depart(rows), partial(_arrive, there, route), partial(_leave, back, route)
                )
            )
        per_chunk = plan.num_experts // self.num_ranks // self.chunks
        whole = RowChunks(chunks, per_chunk, x_TD.dtype, self.overlaps, recompute)
        return whole, (permutation, returns)

    def finish(
        self,
        returning: Sequence[Tensor],
        weight_TK: Tensor,
        metadata: tuple[Permutation, list[RowExchange]],
    ) -> Tensor:
        """Wait for the returned chunks, and sum each token's rows with their weights."""
        permutation, returns = metadata
        rows = [
            exchange.arrive(departed, unchanged, unchanged)
            for exchange, departed in zip(returns, returning, strict=True)
        ]
        return unpermute(torch.cat(rows), weight_TK, permutation)


class ChunkedPacked(_Chunking, PackedAllToAll):
    """The packed dispatcher, in chunks."""

    def route(self, plan: DispatchPlan) -> tuple[Permutation, list[Route]]:
        permutation, count_E = packed_permutation(plan)
        count_nPs = count_E.view(self.chunks, self.num_ranks, -1)
        count_Pe = count_nPs.transpose(0, 1).flatten(1)
        recv_Pe = self.expert_group.all_to_all(count_Pe, None, None, "counts")
        recv_nPs = recv_Pe.view(self.num_ranks, self.chunks, -1).transpose(0, 1)
        # The only host read: the split sizes of all chunks.
        sent, received = torch.stack([count_nPs.sum(2), recv_nPs.sum(2)]).tolist()
        routes = []
        for send, recv, recv_Ps in zip(sent, received, recv_nPs, strict=True):
            orders = local_expert_order(recv_Ps, sum(recv))
            routes.append(
                Route(send, recv, recv_Ps.sum(0), *(partial(gathered, o) for o in orders))
            )
        return permutation.first_rows(sum(map(sum, sent))), routes


class ChunkedPadded(_Chunking, PaddedAllToAll):
    """The padded dispatcher, in chunks."""

    def route(self, plan: DispatchPlan) -> tuple[Permutation, list[Route]]:
        metadata, rows = self.place(plan)
        ranks, experts, slots = metadata.by_rank
        number = experts // self.chunks
        orders = (
            partial(swapped, (ranks, number, slots)),
            partial(swapped, (number, ranks, slots)),
        )
        return metadata.permutation, [Route(None, None, rows, *orders)] * self.chunks


def in_order_of_chunks(plan: DispatchPlan, ranks: int, chunks: int) -> DispatchPlan:
    """Renumber the experts by chunk, rank, and place in the chunk; from rank and place. [T, K]."""
    expert_E = torch.arange(plan.num_experts, device=plan.expert_TK.device)
    number_E = expert_E.view(chunks, ranks, -1).transpose(0, 1).flatten()
    return replace(plan, expert_TK=number_E[plan.expert_TK])


def _arrive(exchange: RowExchange, route: Route, departed: Tensor) -> Arrived:
    rows_RD = exchange.arrive(departed, route.arrange, route.arrange_back)
    return Arrived(rows_RD, route.row_counts, None, exchange.send_gradient)


def _leave(exchange: RowExchange, route: Route, rows_RM: Tensor) -> Tensor:
    return exchange.depart(rows_RM, route.arrange_back, route.arrange)


def check_chunks(layer: ExpertLayer, chunks: int, ranks: int) -> None:
    """Refuse a layer whose experts cannot be divided into chunks. Raises ConfigError."""
    field, why, fix = "parallel.exchange.chunks", None, "use 1"
    if not isinstance(layer, MoE):
        why = f"needs dmoe's own MoE layers, not {type(layer).__name__}"
    elif not forward_takes(layer.experts, "takes_chunks"):
        why = f"needs experts of one shape and of dmoe, not {type(layer.experts).__name__}"
    elif layer.capacity.pool > 1:
        why = "does not work with pooled slots (moe.capacity.pool)"
    elif type(layer.packed) is not PackedAllToAll:
        why = "does not work with copies for the step (parallel.placement.copies)"
    elif isinstance(getattr(layer.packed, "expert_group", None), TwoLevelGroup):
        why = "does not work with two levels, whose second step waits for the first"
    elif (local := layer.experts.num_experts // ranks) % chunks:
        why = f"must divide the {local} experts of each of {ranks} ranks"
        fix = f"use one of {[n for n in range(1, local + 1) if local % n == 0]}"
    if why is not None:
        raise ConfigError(field, chunks, why, fix)
