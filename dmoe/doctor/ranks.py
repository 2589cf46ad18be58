"""Checks over all ranks of a job: hosts, versions, clocks, links, a directory that all see.

Collective: every rank calls `check_ranks`, and all get the same findings.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dmoe.distributed.init import ProcessInfo, barrier
from dmoe.distributed.link_speed import Link, clock_offsets, gather_texts, measure_links
from dmoe.doctor.findings import Finding, judge

MAX_SKEW = 5.0
"""Seconds. Lines of metrics.jsonl and restarts are ordered by rank 0's clock, which changes if the
job moves to another machine."""
SHARED_SECONDS = 5.0
"""A file that rank 0 wrote must be seen by all within this time (NFS caches directories)."""
SLOW_LINK = 4.0
"""A link this many times slower than the median of its kind is named."""


def check_ranks(process: ProcessInfo, own: Sequence[Finding], folder: Path) -> list[Finding]:
    """Gather every machine's findings and measure what is between the ranks. Collective.

    Args:
        process: this rank.
        own: findings of this rank's machine; those of each host's first rank are kept.
        folder: existing directory in which all ranks should see the same files.
    """
    text = json.dumps({"host": _host(), "findings": [asdict(item) for item in own]})
    every = [json.loads(part) for part in gather_texts(text, process.device)]
    hosts = [str(part["host"]) for part in every]
    machines: dict[str, list[Finding]] = {}
    for host, part in zip(hosts, every, strict=True):
        machines.setdefault(host, [Finding(**item) for item in part["findings"]])
    return [
        *_merge(machines),
        _same_versions(machines),
        _clocks(process, hosts),
        *_links(measure_links(process.device), hosts),
        _shared(process, folder, hosts),
    ]


def _host() -> str:
    """Return the host's name and its network namespace: two of those are two hosts to torch."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()


def _merge(machines: dict[str, list[Finding]]) -> list[Finding]:
    """Show what all machines agree on once, and other findings with the machine's name."""
    first = next(iter(machines.values()))
    agreed = [f for f in first if all(f in found for found in machines.values())]
    rest = [
        Finding(f"{item.check} on {_name(host, machines)}", item.state, item.found, item.fix)
        for host, found in machines.items()
        for item in found
        if item not in agreed
    ]
    return [*agreed, *rest]


def _name(host: str, hosts: Sequence[str] | dict[str, list[Finding]]) -> str:
    """Return a host's name, with its number where names repeat."""
    order = list(dict.fromkeys(hosts))
    names = [item.split()[0] for item in order]
    name = host.split()[0]
    return name if names.count(name) == 1 else f"{name} (host {order.index(host)})"


def _same_versions(machines: dict[str, list[Finding]]) -> Finding:
    seen = {
        tuple(item.found for item in found if item.check in ("python", "torch", "accelerate"))
        for found in machines.values()
    }
    fix = "install the same versions on all machines" if len(seen) > 1 else ""
    return judge("hosts", f"{len(machines)}, with {len(seen)} set(s) of versions", failed=fix)


def _clocks(process: ProcessInfo, hosts: list[str]) -> Finding:
    offsets = clock_offsets(process.device)
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    text = f"within {abs(offsets[worst]):.3f} s of rank 0"
    fix = f"set the clock of {_name(hosts[worst], hosts)} (NTP)"
    return judge("clocks", text, warning=fix if abs(offsets[worst]) > MAX_SKEW else "")


def _links(links: list[Link], hosts: list[str]) -> list[Finding]:
    """Summarise pairs inside a host and between hosts; name a link that is far slower."""
    found = []
    for kind, between in (("inside a host", False), ("between hosts", True)):
        pairs = [link for link in links if (hosts[link.first] != hosts[link.second]) == between]
        if not pairs:
            continue
        rate = statistics.median(link.bandwidth for link in pairs)
        slowest = min(pairs, key=lambda link: link.bandwidth)
        latency = statistics.median(link.latency for link in pairs)
        text = (
            f"{rate / 1e9:.2f} GB/s, {latency * 1e6:,.0f} microseconds (median of {len(pairs)} "
            f"pairs); slowest: ranks {slowest.first} and {slowest.second}, "
            f"{slowest.bandwidth / 1e9:.2f} GB/s"
        )
        slow = slowest.bandwidth * SLOW_LINK < rate
        fix = "look at the cable, switch port or interface of these two (GLOO_SOCKET_IFNAME)"
        found.append(judge(f"links {kind}", text, warning=fix if slow else ""))
    return found


def _shared(process: ProcessInfo, folder: Path, hosts: list[str]) -> Finding:
    """Write a file on rank 0 and look for it on all."""
    name = gather_texts(uuid.uuid4().hex if process.is_main else "", process.device)[0]
    probe = folder / f".dmoe-doctor-{name}"
    if process.is_main:
        with suppress(OSError):
            probe.touch()
    barrier()
    end = time.monotonic() + SHARED_SECONDS
    while not (seen := probe.exists()) and time.monotonic() < end:
        time.sleep(0.05)
    every = gather_texts("yes" if seen else "no", process.device)
    barrier()
    if process.is_main:
        with suppress(OSError):
            probe.unlink()
    blind = {_name(host, hosts) for host, saw in zip(hosts, every, strict=True) if saw == "no"}
    text = f"{folder} is seen by all ranks"
    if not blind:
        return judge("shared directory", text)
    fix = "put train.run_dir on a file system of all machines, or a restart finds no checkpoint"
    return judge("shared directory", f"{folder} is not seen on {', '.join(blind)}", failed=fix)
