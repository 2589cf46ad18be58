"""Collective check (`debug.collectives`): ranks compare each all-to-all before they run it.

gloo accepts split sizes that do not match the peer's without an error (missing rows are
uninitialised memory) or aborts the process, and a rank that skipped a collective shows up as a
time-out somewhere else. With the check on, each rank writes a record into the store that started
the group, reads the records of its peers and raises on every rank, before a wrong number is used.

Cost, when on: P+1 small messages to the store per all-to-all, in forward and backward; a step is
several times slower. Off: nothing.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from dmoe.config.errors import DmoeError


class CollectiveCheckError(DmoeError):
    """The ranks of an all-to-all are at different operations or expect different sizes."""

    every_rank = True


class CollectiveChecker:
    """Compares every all-to-all of one process group.

    All layers share one checker, so that a skipped all-to-all is detected at the next one.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.ranks, self.rank = dist.get_process_group_ranks(group), dist.get_rank()
        self.timeout, self.count, self.step = timeout, 0, 0
        # The store that init_process_group was given: torch has no public function that returns it.
        self.store = PrefixStore(f"collective-check-{self.ranks[0]}", _get_default_store())

    def compare(
        self,
        layer: int,
        operation: str,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
    ) -> None:
        """Compare this all-to-all with those of all peers.

        Args:
            layer: index of the MoE layer.
            operation: dispatch, combine, counts, or one of these with " backward".
            rows: [N, M], the rows to send.
            send_counts: rows for each rank; None: equal shares.
            recv_counts: rows from each rank; None: equal shares.

        Raises:
            CollectiveCheckError: on all ranks alike, where operations or sizes differ, or where a
                peer does not arrive within the time-out.
        """
        equal = [len(rows) // len(self.ranks)] * len(self.ranks)
        dtype = str(rows.dtype).removeprefix("torch.")
        own = {
            "operation": f"step {self.step}, MoE layer {layer}, {operation}",
            "rows": f"rows of {rows.shape[1]} {dtype} values",
            "send": equal if send_counts is None else send_counts,
            "receive": equal if recv_counts is None else recv_counts,
        }
        self.store.set(f"{self.count}/{self.rank}", json.dumps(own))
        records = {
            rank: own if rank == self.rank else self._read_peer_record(rank, own["operation"])
            for rank in self.ranks
        }
        mismatch = find_mismatch(records)
        if mismatch:
            raise CollectiveCheckError(f"exchange {self.count} does not match: {mismatch}")
        # A rank that writes record n has read record n - 1, so record n - 2 is no longer needed.
        if self.count > 1:
            self.store.delete_key(f"{self.count - 2}/{self.rank}")
        self.count += 1

    def _read_peer_record(self, rank: int, operation: object) -> dict[str, Any]:
        start = time.monotonic()
        try:
            self.store.wait([f"{self.count}/{rank}"], timedelta(seconds=self.timeout))
        # The TCP store raises a DistStoreError, the file store a plain RuntimeError.
        except RuntimeError:
            waited = time.monotonic() - start
            raise CollectiveCheckError(
                f"exchange {self.count}: rank {rank} did not reach {operation} within"
                f" {waited:.0f} s (rank {self.rank} did)"
            ) from None
        record: dict[str, Any] = json.loads(self.store.get(f"{self.count}/{rank}"))
        return record


def find_mismatch(records: dict[int, dict[str, Any]]) -> str:
    """Describe the first mismatch among the ranks' records; empty if there is none."""
    ranks = sorted(records)
    first = records[ranks[0]]
    for rank in ranks[1:]:
        other = records[rank]
        for field in ("operation", "rows"):
            if other[field] != first[field]:
                return (
                    f"rank {ranks[0]} is at {first['operation']} ({first['rows']}),"
                    f" rank {rank} at {other['operation']} ({other['rows']})"
                )
    for i, sender in enumerate(ranks):
        for j, receiver in enumerate(ranks):
            sent, expected = records[sender]["send"][j], records[receiver]["receive"][i]
            if sent != expected:
                return (
                    f"{first['operation']}: rank {sender} sends {sent} rows to rank {receiver},"
                    f" which expects {expected}"
                )
    return ""
