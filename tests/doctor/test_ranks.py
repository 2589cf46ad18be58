"""`dmoe doctor` over ranks: links, clocks, versions, a directory that not all ranks see."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.distributed.init import init_distributed
from dmoe.distributed.link_speed import Link, _spread, measure_links
from dmoe.distributed.local_ranks import run_ranks
from dmoe.doctor import Finding, check_ranks, ranks


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8])
def test_the_rounds_meet_every_pair_once(world: int) -> None:
    pairs = [
        frozenset((rank, (shift - rank) % world))
        for shift in _spread(world)
        for rank in range(world)
    ]
    met = [pair for pair in pairs if len(pair) == 2]
    assert len(met) == 2 * len(set(met)) == world * (world - 1), "each from both its sides"
    assert sorted(_spread(world)) == (list(range(world)) if world > 1 else [])


def links_of(rank: int, world: int) -> list[tuple[int, int, bool]]:
    found = measure_links(torch.device("cpu"))
    return [(link.first, link.second, min(link.latency, link.bandwidth) > 0) for link in found]


@pytest.mark.ranks
def test_links_of_three_ranks() -> None:
    everyone = run_ranks(3, links_of)
    assert everyone == [[(0, 1, True), (0, 2, True), (1, 2, True)]] * 3


def check(rank: int, world: int, folder: str, fault: str) -> list[dict[str, Any]]:
    """Return the findings of ranks that have their own directory, version, clock or host."""
    own = [Finding("torch", "ok", f"2.{rank if fault == 'version' else 0}")]
    path = Path(folder) / (str(rank) if fault == "directory" else "")
    path.mkdir(exist_ok=True)
    if fault == "clock" and rank == 1:
        real = time.time
        time.time = lambda: real() + 60.0
    if fault in ("version", "directory"):
        ranks._host = lambda: f"node{rank} net"
    ranks.SHARED_SECONDS = 0.3
    found = check_ranks(init_distributed("cpu", "gloo"), own, path)
    return [asdict(item) for item in found]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fault", "state", "name"),
    [
        ("", "ok", "shared directory"),
        ("directory", "failed", "shared directory"),
        ("version", "failed", "hosts"),
        ("clock", "warning", "clocks"),
    ],
)
def test_two_ranks(fault: str, state: str, name: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, check, str(tmp_path), fault)
    if fault != "directory":  # there each names its own path
        assert first == second, "all ranks have the same findings"
    (finding,) = [item for item in first if item["check"] == name]
    assert finding["state"] == state, finding
    if fault == "version":
        assert {"torch on node0", "torch on node1"} <= {item["check"] for item in first}
    if fault == "directory":
        assert "node1" in finding["found"]
    kinds = {item["check"] for item in first if item["check"].startswith("links")}
    between = fault in ("version", "directory")
    assert kinds == {"links between hosts" if between else "links inside a host"}
    assert list(tmp_path.rglob(".dmoe*")) == []


def test_a_link_far_slower_than_the_others_is_named() -> None:
    fast = [Link(0, 1, 1e-5, 8e9), Link(0, 2, 1e-5, 8e9), Link(0, 3, 1e-5, 8e9)]
    (fine,) = ranks._links(fast, ["a"] * 4)
    (slow,) = ranks._links([*fast, Link(2, 3, 1e-5, 1e9)], ["a"] * 4)
    assert (fine.state, slow.state) == ("ok", "warning")
    assert "ranks 2 and 3" in slow.found
