"""Drill 35: two hosts, and the link between them is cut in the middle of a step.

The hosts are two network namespaces with a cable (a veth pair) between them, each with a launcher of its own and one rank:

    namespace a: torchrun, keeps the rendezvous | 10.77.0.1 ---- cable ---- 10.77.0.2 | namespace b: torchrun

What one rank sends the other hears nothing of, and no reset arrives, as with a switch that has died: only a time-out can tell.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.drills.conftest import Reference
from tests.drills.jobs import Job, events, finish, job, processes_of, until

pytestmark = pytest.mark.drills

TIMEOUT = 6
"""Seconds, `parallel.timeout`."""


@dataclass(frozen=True)
class Hosts:
    """Two namespaces, and the name of each one's end of the cable."""

    names: tuple[str, str]
    ends: tuple[str, str]

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def cable(self, state: str) -> None:
        """Put the cable `up` or `down`, at both ends."""
        for name, end in zip(self.names, self.ends, strict=True):
            _ip("-n", name, "link", "set", end, state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def _build(hosts: Hosts) -> None:
    for name in hosts.names:
        _ip("netns", "add", name)
    first, second = hosts.ends
    _ip(
        "link",
        "add",
        first,
        "netns",
        hosts.names[0],
        "type",
        "veth",
        "peer",
        "name",
        second,
        "netns",
        hosts.names[1],
    )
    for host, (name, end) in enumerate(zip(hosts.names, hosts.ends, strict=True)):
        _ip("-n", name, "address", "add", f"{hosts.address(host)}/24", "dev", end)
        _ip("-n", name, "link", "set", "lo", "up")
    hosts.cable("up")


def _remove(hosts: Hosts) -> None:
    """End what runs in the namespaces, then forget them; the cable goes with them."""
    for name in hosts.names:
        inside = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, timeout=20, check=False
        ).stdout
        for pid in inside.split():
            with suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(
            ["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False
        )


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command (iproute2)")
    mine = os.getpid()
    pair = Hosts((f"dmoe-a-{mine}", f"dmoe-b-{mine}"), (f"dmoe{mine}a", f"dmoe{mine}b"))
    try:
        try:
            _build(pair)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield pair
    finally:
        _remove(pair)


def start_nodes(
    stack: ExitStack, hosts: Hosts, run: Path, reference: Reference, fault: str
) -> list[Job]:
    """One launcher a host, as launch/multi_node.sh starts them: the first keeps the rendezvous, and shares its store with no rank."""
    nodes = []
    for host, name in enumerate(hosts.names):
        meeting = [
            *(
                "--nnodes",
                "2",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                f"{hosts.address(0)}:29500",
                "--rdzv-id",
                "drill",
            ),
            *(
                "--rdzv-conf",
                f"is_host={str(host == 0).lower()}",
                "--local-addr",
                hosts.address(host),
            ),
        ]
        node = job(
            run,
            *reference.overrides,
            f"parallel.timeout={TIMEOUT}",
            ranks=1,
            restarts=3,
            fault=fault,
            trace=True,
            prefix=("ip", "netns", "exec", name),
            meeting=meeting,
            GLOO_SOCKET_IFNAME=hosts.ends[host],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        nodes.append(stack.enter_context(node))
    return nodes


def test_the_link_is_cut_in_a_step_and_restored(
    tmp_path: Path, hosts: Hosts, two_ranks: Reference
) -> None:
    """Both ranks end after the time-out and name the other; with the link back, the job goes on from its checkpoint, bit for bit."""
    run = tmp_path / "run"
    with ExitStack() as stack:
        first, second = start_nodes(stack, hosts, run, two_ranks, "hold@step rank=1 step=13")
        until(lambda: Path(f"{run}.held").exists(), first, timeout=120, what="step 13 on rank 1")
        ranks = set(first.workers())
        assert len(ranks) == 2
        hosts.cable("down")
        Path(f"{run}.go").touch()
        until(
            lambda: not ranks & set(processes_of(run)),
            timeout=60,
            what="the end of both ranks, which cannot hear each other",
        )
        hosts.cable("up")
        outcomes = [finish(node) for node in (first, second)]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "dmoe: rank 0 lost rank 1 in step 13" in outcomes[0].errors
    assert "dmoe: rank 1 lost rank 0" in outcomes[1].errors
    assert [line["resumed_from"] for line in events(run, "restart")] == [10]
    two_ranks.equals(run)
    assert processes_of(run) == []
