"""The exchange over nodes in two steps (`parallel.exchange.levels=2`), with the same numbers.

Nodes of L ranks with fast links inside, slower ones between. Rank (a, i) is the i-th of node a:

    one level       (a, i) -> (b, j)                 P - L messages of a rank to other nodes
    two, outward    (a, i) -> (a, j) -> (b, j)       inside the node first: M - 1 messages, L times
    two, back       (b, j) -> (a, j) -> (a, i)       as large; the rows of a node in one message

So rows that return, and gradients, take the way that they came, and rank (a, j) needs to know one
table only: how many rows each rank of its node sends through it to each node. It sees these numbers
when the counts are exchanged, on the same way. This is the hierarchical all-to-all of DeepSpeed-MoE
(Rajbhandari et al. 2022, section 5.3) and Tutel (2DH; Hwang et al. 2023, section 4.3), for unequal
splits too. What arrives is in the order of one level: no bit changes.

Cost: twice the collectives, half of them inside a node: forward 6 (packed) or 4 (padded), backward
4; one host read as before (packed). Bytes between nodes are those of one level. Inside: (L-1)/L of
all rows, those for other nodes too. Each step brings its blocks into order: two copies of the rows.

Letters: P = EP ranks, L ranks of a node, M = P / L nodes, X numbers of a rank; i, j ranks of a
node, a, b nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.distributed.all_to_all import ExpertGroup
from dmoe.distributed.mesh import ParallelMesh
from dmoe.moe.dispatch import profiled


class RelayedCounts(list[int]):
    """Rows for each rank or from each rank, with what this rank passes on for others.

    Args:
        counts: as one level has them.
        passed: [L][M], rows of each rank of this node for each node, which pass through this rank.
        outward: whether rows that are split by these counts are on their way out.
    """

    def __init__(self, counts: Sequence[int], passed: list[list[int]], outward: bool) -> None:
        super().__init__(counts)
        self.passed, self.outward = passed, outward


@dataclass(frozen=True)
class TwoLevelGroup(ExpertGroup):
    """One layer's all-to-all over the nodes of its ranks; `group` has them all."""

    inside: dist.ProcessGroup | None = None
    """The ranks of this node."""
    across: dist.ProcessGroup | None = None
    """The ranks with the same place in other nodes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return L and M."""
        assert self.inside is not None
        assert self.across is not None
        return dist.get_world_size(self.inside), dist.get_world_size(self.across)

    def exchange_counts(self, count_PX: Tensor) -> tuple[Tensor, Tensor | None]:
        """Exchange numbers for each rank; also return those that pass through, [L * M, X]."""
        local, nodes = self.shape
        numbers = count_PX.shape[1:]
        if self.checker is not None:
            self.checker.compare(self.layer, "counts", count_PX, None, None)
        out_LMX = count_PX.view(nodes, local, *numbers).transpose(0, 1)
        passed_LMX = self._send(out_LMX, None, None, self.inside)
        recv_MLX = self._send(passed_LMX.transpose(0, 1), None, None, self.across)
        return recv_MLX.flatten(0, 1), passed_LMX.flatten(0, 1)

    def splits(self, read: list[list[int]]) -> tuple[list[int], list[int]]:
        """Return rows to send and to receive; the last of `read` is what passes through."""
        nodes = self.shape[1]
        send, recv, flat = read[0], read[1], read[-1]
        passed = [flat[first : first + nodes] for first in range(0, len(flat), nodes)]
        return RelayedCounts(send, passed, True), RelayedCounts(recv, passed, False)

    def start(
        self,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        operation: str,
        *,
        wait: bool = False,
    ) -> tuple[Tensor, dist.Work | None]:
        """Run an all-to-all in two steps; `all_to_all` has the arguments. Always waits."""
        assert wait, "the second step waits for the first"
        if self.checker is not None:
            self.checker.compare(self.layer, operation, rows, send_counts, recv_counts)
        if send_counts is None or recv_counts is None:
            local, nodes = self.shape
            each = len(rows) // (local * nodes)
            passed = [[each] * nodes] * local
            send_counts = RelayedCounts([each] * (local * nodes), passed, True)
            recv_counts = send_counts
        assert isinstance(send_counts, RelayedCounts), f"{operation}: no counts of what passes"
        assert sum(send_counts) == len(rows), (
            f"{operation}: {len(rows)} rows, but {sum(send_counts)} to send"
        )
        step = self._outward if send_counts.outward else self._back
        with profiled("exchange"):
            return step(rows, send_counts, recv_counts, send_counts.passed), None

    def _outward(
        self, rows: Tensor, send: list[int], recv: list[int], passed: list[list[int]]
    ) -> Tensor:
        """Send inside the node, to the rank with the place of the destination; then across."""
        local, nodes = self.shape
        through = [sum(counts) for counts in zip(*passed, strict=True)]
        rows = _by_other(rows, send, nodes)
        rows = self._send(rows, _sums(send, local, 0), [sum(c) for c in passed], self.inside)
        rows = _by_other(rows, [n for counts in passed for n in counts], local)
        return self._send(rows, through, _sums(recv, local, 1), self.across)

    def _back(
        self, rows: Tensor, send: list[int], recv: list[int], passed: list[list[int]]
    ) -> Tensor:
        """Send across, to the rank of the same place in the node of the destination; inside."""
        local, nodes = self.shape
        through = [sum(counts) for counts in zip(*passed, strict=True)]
        rows = self._send(rows, _sums(send, local, 1), through, self.across)
        rows = _by_other(rows, [n for counts in zip(*passed, strict=True) for n in counts], nodes)
        rows = self._send(rows, [sum(c) for c in passed], _sums(recv, local, 0), self.inside)
        return _by_other(
            rows, [recv[b * local + j] for j in range(local) for b in range(nodes)], local
        )

    def _send(
        self,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        assert group is not None
        rows = rows.contiguous()
        number = len(rows) if recv_counts is None else sum(recv_counts)
        received = rows.new_empty((number, *rows.shape[1:]))
        with self.timer.measure(rows, send_counts, group):
            dist.all_to_all_single(received, rows, recv_counts, send_counts, group=group)
        return received


def _by_other(rows: Tensor, counts: list[int], outer: int) -> Tensor:
    """Swap the two orders of blocks of rows: `outer` runs of blocks, whose sizes are given."""
    blocks, inner = rows.split(counts), len(counts) // outer
    return torch.cat([blocks[o * inner + i] for i in range(inner) for o in range(outer)])


def _sums(counts: list[int], local: int, dim: int) -> list[int]:
    """Sum the counts of all ranks over nodes (0), [L], or over the ranks of a node (1), [M]."""
    nodes = len(counts) // local
    if dim == 1:
        return [sum(counts[a * local : (a + 1) * local]) for a in range(nodes)]
    return [sum(counts[i::local]) for i in range(local)]


def check_levels(mesh: ParallelMesh, copies: bool) -> None:
    """Refuse two levels with copies for the step, or a mesh of one. Raises ConfigError."""
    why = None
    if mesh.node_group is None or mesh.cross_group is None:
        why = "needs process groups of nodes, which this mesh was built without"
    elif copies:
        why = "does not work with copies for the step (parallel.placement.copies)"
    if why is not None:
        raise ConfigError("parallel.exchange.levels", 2, why, "use 1")
