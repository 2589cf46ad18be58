"""Measured seconds of kernels and collectives, as `dmoe plan --calibrate` writes them.

    kernel:      seconds = a + b * bytes + c * flops      per name of operator and number of threads
    collective:  seconds = a + b * bytes                  per name and number of ranks

Fitted with a, b, c >= 0 to calls of the sizes that a step has. Ranks that share a core share its
time: with more ranks than cores, arithmetic takes as much longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmoe.distributed.fake_world import Collective
from dmoe.simulation.cluster import Cluster
from dmoe.simulation.recorder import Kernel


@dataclass(frozen=True)
class Tables:
    """The tables of one cluster for a number of ranks."""

    kernels: Mapping[str, list[float]]
    """a, b, c by operator; "": of all others."""
    collectives: Mapping[str, list[float]]
    """a, b by name."""
    shared: float
    """Ranks per core."""

    @staticmethod
    def of(cluster: Cluster, ranks: int) -> Tables | None:
        """Return the tables for `ranks` ranks on this machine; None without a calibration."""
        tables: dict[str, Any] = cluster.tables
        if not tables:
            return None
        cores = cluster.devices
        threads = str(max(1, cores // ranks))
        measured = max((n for n in tables["collectives"] if int(n) <= ranks), key=int, default="2")
        return Tables(
            tables["kernels"][threads],
            tables["collectives"][measured],
            max(1.0, ranks / cores),
        )

    def kernel(self, kernel: Kernel) -> float:
        """Return the seconds of one kernel call."""
        a, b, c = self.kernels.get(kernel.name) or self.kernels[""]
        return self.shared * (a + b * kernel.bytes + c * kernel.flops)

    def collective(self, collective: Collective) -> float:
        """Return the seconds of one collective call."""
        a, b = self.collectives[collective.name]
        return a + b * collective.sent
