"""`debug.collectives`: before each exchange the ranks compare what they are about to do.

gloo takes split sizes that do not match the peer's in silence (the rows that are missing are whatever was in memory) or aborts the
process, and a rank that has skipped a collective shows as a time-out somewhere else. Here each rank writes a line into the store
that started the group, reads its peers' lines, and says in words what does not fit, on every rank, before a wrong number is used.

Cost, when on: P+1 small messages to the store an exchange, in forward and backward; a step is several times slower. Off: nothing.
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
    """The ranks of an exchange are not doing the same thing."""

    every_rank = True


class CollectiveChecker:
    """Compares every exchange of one group of ranks. One for all layers, so that a skipped exchange is seen at the next one."""

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.ranks, self.rank = dist.get_process_group_ranks(group), dist.get_rank()
        self.timeout, self.count, self.step = timeout, 0, 0
        # The store that init_process_group was given; torch has no public way to ask for it. Replace when there is one.
        self.store = PrefixStore(f"watch-{self.ranks[0]}", _get_default_store())

    def compare(
        self,
        layer: int,
        operation: str,
        rows: Tensor,
        send_counts: list[int] | None,
        recv_counts: list[int] | None,
    ) -> None:
        """Raise ExchangeError, on all ranks alike, unless every peer is at the same operation and the splits fit each other."""
        mine = {
            "what": f"step {self.step}, MoE layer {layer}, {operation}",
            "rows": f"{rows.shape[1]} numbers of {str(rows.dtype).removeprefix('torch.')} a row",
            "send": send_counts if send_counts is not None else [len(rows) // len(self.ranks)] * len(self.ranks),
            "receive": recv_counts
            if recv_counts is not None
            else [len(rows) // len(self.ranks)] * len(self.ranks),
        }
        self.store.set(f"{self.count}/{self.rank}", json.dumps(mine))
        lines = {
            rank: mine if rank == self.rank else self._read_peer_record(rank, mine["what"])
            for rank in self.ranks
        }
        problem = find_mismatch(lines)
        if problem:
            raise CollectiveCheckError(f"exchange {self.count} does not fit: {problem}")
        if (
            self.count > 1
        ):  # everybody who writes line n has read line n - 1, so n - 2 is no longer needed
            self.store.delete_key(f"{self.count - 2}/{self.rank}")
        self.count += 1

    def _read_peer_record(self, rank: int, what: object) -> dict[str, Any]:
        began = time.monotonic()
        try:
            self.store.wait([f"{self.count}/{rank}"], timedelta(seconds=self.timeout))
        except (
            RuntimeError
        ):  # a DistStoreError of the TCP store, a plain RuntimeError of the file store
            waited = time.monotonic() - began
            raise CollectiveCheckError(
                f"exchange {self.count}: rank {rank} has not come to {what} within {waited:.0f} s (rank {self.rank} has)"
            ) from None
        line: dict[str, Any] = json.loads(self.store.get(f"{self.count}/{rank}"))
        return line


def find_mismatch(lines: dict[int, dict[str, Any]]) -> str:
    """What does not fit among the ranks' lines, in words; empty if all does."""
    ranks = sorted(lines)
    first = lines[ranks[0]]
    for rank in ranks[1:]:
        for field in ("what", "rows"):
            if lines[rank][field] != first[field]:
                other = lines[rank]
                return f"rank {ranks[0]} is at {first['what']} ({first['rows']}), rank {rank} at {other['what']} ({other['rows']})"
    for i, sender in enumerate(ranks):
        for j, receiver in enumerate(ranks):
            sent, expected = lines[sender]["send"][j], lines[receiver]["receive"][i]
            if sent != expected:
                return f"{first['what']}: rank {sender} sends {sent} rows to rank {receiver}, which expects {expected}"
    return ""
