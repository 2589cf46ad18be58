"""Dispatchers with fixed slots, so with equal splits and without a host read; pooled slots too.

Padded sends C slots for each (group, expert). Forward 2 collectives, backward 2, no host read: all
shapes follow from the config, so they need equally many tokens on all ranks. Bytes per rank and
direction: (EP-1)/EP * E * G * C * M * itemsize.

Pooled slots: equal splits, though experts get any number of rows. An expert of a pool may fill any
of its P*C slots, so it has no fixed number of rows. Instead each EP rank gets one block of a fixed
size: the rows of its experts, sorted by expert, then unused rows of zeros, then the number of rows
of each expert, as bytes in the last X rows. The receiver orders the blocks' rows by expert, unused
ones last, which no expert computes.

    block of 2 experts, B = 6, X = 1      0 0 0 1 - - #       # = (3, 1)

The counts ride in the rows' own message because one of their own would be a third collective in
forward. X is 1 if a row has 4e bytes.

Cost: the collectives of padded. Bytes per rank and direction: (EP-1) * (B + X) * M * itemsize,
with B = G * pools * min(P*C, K*T_g) rows and `pools` the most pools of which one rank has experts.
Where no pool spans ranks, B is the G*C*e rows of slots that are not pooled. A pool that spans ranks
has rows for all its slots on each of them.

Letters: T_g tokens of a group on this rank, D width, M row width, e local experts, K experts per
token, P experts of a pool, N EP ranks, R rows, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.distributed.all_to_all import ExpertGroup, reorder
from dmoe.moe.dispatch import Permutation, permute, unpermute
from dmoe.moe.interfaces import RowDispatcher, SentRows, TokensPerExpert
from dmoe.moe.padded_slots import padded_permutation, pooled_rows
from dmoe.moe.routing import DispatchPlan

Blocks = tuple[int, int, int]
"""Sizes of blocks of rows in two dimensions, and the rows of one block: slots G * C."""


@dataclass(frozen=True)
class PaddedDispatchMetadata:
    """State of one padded dispatch that `combine` needs."""

    permutation: Permutation
    by_rank: Blocks
    """Blocks of rows by source rank and local expert, as they are sent."""

    @property
    def by_expert(self) -> Blocks:
        """The same blocks by local expert and source rank, as experts compute them."""
        ranks, experts, slots = self.by_rank
        return experts, ranks, slots

    def order_by_expert(self, device: torch.device) -> Tensor:
        """Return the places, by source rank, of the rows by local expert, int64 [R]."""
        place_R = self.permutation.ranges.get(math.prod(self.by_rank), device)
        return place_R.view(self.by_rank).transpose(0, 1).flatten()


def swapped(blocks: Blocks, rows: Tensor) -> Tensor:
    """Swap the two dimensions of blocks of rows.

    All sizes are given: torch cannot infer a -1 where no rank has a token.
    """
    return rows.view(*blocks, rows.shape[1]).transpose(0, 1).flatten(0, 2)


class PaddedAllToAll(RowDispatcher):
    """Dispatcher with fixed slots and equal splits: no counts, no host read."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, TokensPerExpert, PaddedDispatchMetadata]:
        """Send each token to the ranks of its experts; see `moe.interfaces.Dispatcher`."""
        metadata, rows = self.place(plan)
        return swapped(metadata.by_rank, self.send(x_TD, metadata)), rows, metadata

    def send_rows(self, x_TD: Tensor, plan: DispatchPlan) -> SentRows:
        """Send them, without a pass that groups them by expert."""
        metadata, rows = self.place(plan)
        order_R = metadata.order_by_expert(x_TD.device)
        return SentRows(self.send(x_TD, metadata), order_R, rows, metadata)

    def send(self, x_TD: Tensor, metadata: PaddedDispatchMetadata) -> Tensor:
        """Return the rows that this rank receives, by source rank."""
        rows_RD = permute(x_TD, metadata.permutation)
        return self.expert_group.all_to_all_autograd(rows_RD, None, None, "dispatch")

    def place(self, plan: DispatchPlan) -> tuple[PaddedDispatchMetadata, int]:
        """Return the places of the rows to send, and the rows that each local expert gets."""
        assert plan.slots is not None, "the padded exchange needs a capacity"
        slots = plan.slots.rows_per_expert
        by_rank = (self.num_ranks, plan.num_experts // self.num_ranks, slots)
        metadata = PaddedDispatchMetadata(padded_permutation(plan), by_rank)
        return metadata, self.num_ranks * slots

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PaddedDispatchMetadata
    ) -> Tensor:
        """Return the rows to their tokens and sum them with their weights."""
        return self.return_rows(swapped(metadata.by_expert, rows_RD), weight_TK, metadata)

    def return_rows(
        self, rows_RM: Tensor, weight_TK: Tensor, metadata: PaddedDispatchMetadata
    ) -> Tensor:
        """Return rows that are in the order of their source ranks, and sum them."""
        rows_NM = self.expert_group.all_to_all_autograd(rows_RM, None, None, "combine")
        return unpermute(rows_NM, weight_TK, metadata.permutation)


@dataclass(frozen=True)
class PooledDispatchMetadata:
    """State of one pooled dispatch that `combine` needs."""

    permutation: Permutation
    order_R: Tensor
    """int64: order by source rank -> order by local expert, unused rows last."""
    inverse_R: Tensor
    """int64: the inverse of `order_R`."""
    unused_R: Tensor
    """bool, by source rank: rows that hold no assignment."""


class PooledAllToAll(RowDispatcher):
    """Dispatcher of pooled slots with equal splits: no host read."""

    def __init__(self, expert_group: ExpertGroup) -> None:
        self.expert_group, self.num_ranks = expert_group, dist.get_world_size(expert_group.group)

    def dispatch(
        self, x_TD: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, TokensPerExpert, PooledDispatchMetadata]:
        """Send each token to the ranks of its experts; see `moe.interfaces.Dispatcher`."""
        rows_RD, order_R, counts, metadata = self.send_rows(x_TD, plan)
        return (
            reorder(rows_RD, order_R, metadata.inverse_R, metadata.unused_R),
            counts,
            metadata,
        )

    def send_rows(self, x_TD: Tensor, plan: DispatchPlan) -> SentRows:
        """Send them, without a pass that groups them by expert; unused rows are not cleared."""
        extra = count_rows(plan.num_experts // self.num_ranks, x_TD.shape[1] * x_TD.element_size())
        permutation, count_Ne = pooled_rows(plan, self.num_ranks, extra)
        rows_RD = permute(x_TD, permutation)
        count_bytes(rows_RD, extra, count_Ne).copy_(count_Ne.to(torch.int32).view(torch.uint8))
        rows_RD = self.expert_group.all_to_all_autograd(rows_RD, None, None, "dispatch")
        count_Ne = count_bytes(rows_RD, extra, count_Ne).contiguous().view(torch.int32).long()

        block = len(rows_RD) // self.num_ranks
        slot_NB = torch.arange(block, device=rows_RD.device).repeat(self.num_ranks, 1)
        # the expert of each row; e for unused ones
        expert_R = torch.searchsorted(count_Ne.cumsum(1), slot_NB, right=True).flatten()
        order_R = expert_R.sort(stable=True).indices
        position_R = torch.arange(len(order_R), device=order_R.device)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, position_R)
        unused_R = expert_R == count_Ne.shape[1]
        metadata = PooledDispatchMetadata(permutation, order_R, inverse_R, unused_R)
        counts = torch.cat([count_Ne.sum(0), unused_R.sum().view(1)])
        return SentRows(rows_RD, order_R, counts, metadata)

    def combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: PooledDispatchMetadata
    ) -> Tensor:
        """Return the rows to their tokens and sum them with their weights."""
        order_R, inverse_R = metadata.order_R, metadata.inverse_R
        rows_by_source_RD = reorder(rows_RD, inverse_R, order_R, metadata.unused_R[order_R])
        return self.return_rows(rows_by_source_RD, weight_TK, metadata)

    def return_rows(
        self, rows_RM: Tensor, weight_TK: Tensor, metadata: PooledDispatchMetadata
    ) -> Tensor:
        """Return rows that are in the order of their source ranks, and sum them."""
        rows_NM = self.expert_group.all_to_all_autograd(rows_RM, None, None, "combine")
        return unpermute(rows_NM, weight_TK, metadata.permutation)


def count_rows(num_experts: int, row_bytes: int) -> int:
    """Return X, the rows at the end of a block that hold the int32 counts of its experts."""
    return -(-4 * num_experts // row_bytes)


def count_bytes(rows_RD: Tensor, extra: int, count_Ne: Tensor) -> Tensor:
    """Return a view of the bytes that hold the counts in each block's last rows, uint8 [N, 4e]."""
    ranks, num_experts = count_Ne.shape
    rows_NBb = rows_RD.detach().view(ranks, -1, rows_RD.shape[1]).view(torch.uint8)
    return rows_NBb[:, -extra:].view(ranks, -1)[:, : 4 * num_experts]
