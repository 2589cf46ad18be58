"""Drill 35: the link between two hosts is cut in the middle of a step. And two train like one.

The hosts are two network namespaces with a veth pair between them, each with a launcher and a rank:

    namespace a: torchrun, rendezvous | 10.77.0.1 ---- link ---- 10.77.0.2 | namespace b: torchrun

Packets are lost and no connection is reset, as with a failed switch: only a timeout detects it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.commands import dmoe, environment
from tests.drills.conftest import Reference
from tests.drills.jobs import Job, events, finish, job, processes_of, wait_until
from tests.fork_server import LAUNCHER
from tests.forked import ForkedProcess

pytestmark = pytest.mark.drills

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quickstart.yaml"
SMALL = [
    "train.steps=3",
    "train.log_every=1",
    "model.dim=32",
    "model.layers=2",
    "data.source=synthetic:zipf",
    "train.eval_every=0",
    "train.sample_tokens=0",
    "train.global_batch=8",
    "data.seq_len=32",
]
TIMEOUT = 6
"""`parallel.timeout` in seconds."""


@dataclass(frozen=True)
class Hosts:
    """Two network namespaces and the interface of each."""

    names: tuple[str, str]
    interfaces: tuple[str, str]

    def address(self, host: int) -> str:
        """Return the IP address of host 0 or 1."""
        return f"10.77.0.{host + 1}"

    def set_link(self, state: str) -> None:
        """Set both interfaces `up` or `down`."""
        for name, interface in zip(self.names, self.interfaces, strict=True):
            _ip("-n", name, "link", "set", interface, state)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def _build(hosts: Hosts) -> None:
    for name in hosts.names:
        _ip("netns", "add", name)
    first, second = hosts.interfaces
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
    for host, (name, interface) in enumerate(zip(hosts.names, hosts.interfaces, strict=True)):
        _ip("-n", name, "address", "add", f"{hosts.address(host)}/24", "dev", interface)
        _ip("-n", name, "link", "set", "lo", "up")
    hosts.set_link("up")


def _remove(hosts: Hosts) -> None:
    """Kill all processes in the namespaces and delete them with their interfaces."""
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
    """Start one launcher per host as launch/multi_node.sh does.

    The first runs the rendezvous and does not share its store with the ranks.
    """
    nodes = []
    for host, name in enumerate(hosts.names):
        rendezvous = [
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
            network=name,
            rendezvous=rendezvous,
            GLOO_SOCKET_IFNAME=hosts.interfaces[host],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        nodes.append(stack.enter_context(node))
    return nodes


def test_the_link_is_cut_in_a_step_and_restored(
    tmp_path: Path, hosts: Hosts, two_ranks: Reference
) -> None:
    """Both ranks time out and name each other; with the link restored, the job resumes exactly."""
    run = tmp_path / "run"
    with ExitStack() as stack:
        first, second = start_nodes(stack, hosts, run, two_ranks, "hold@step rank=1 step=13")
        wait_until(
            lambda: Path(f"{run}.held").exists(), first, timeout=120, what="step 13 on rank 1"
        )
        ranks = set(first.workers())
        assert len(ranks) == 2
        hosts.set_link("down")
        Path(f"{run}.go").touch()
        wait_until(
            lambda: not ranks & set(processes_of(run)),
            timeout=60,
            what="the end of both disconnected ranks",
        )
        hosts.set_link("up")
        outcomes = [finish(node) for node in (first, second)]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "dmoe: rank 0 lost rank 1 in step 13" in outcomes[0].errors
    assert "dmoe: rank 1 lost rank 0" in outcomes[1].errors
    assert [line["resumed_from"] for line in events(run, "restart")] == [10]
    two_ranks.assert_equals(run)
    assert processes_of(run) == []


def test_two_hosts_train_bit_for_bit_like_one(tmp_path: Path, hosts: Hosts) -> None:
    """Four ranks with EP 4 by `launch/multi_node.sh`: tokens and gradients cross the link.

    With EP 2, inside each host, the same was seen; one of the two is enough time in CI.
    """
    settings = [*SMALL, "parallel.ep=4"]
    alone, apart = tmp_path / "one", tmp_path / "two"
    arguments = ["train", CONFIG, *settings, f"train.run_dir={alone}", "--ranks", "4"]
    assert dmoe(*arguments, cwd=ROOT).returncode == 0
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                start_script(tmp_path, hosts, host, [CONFIG, *settings], RUN_DIR=str(apart))
            )
            for host in range(len(hosts.names))
        ]
        assert [node.wait(timeout=180) for node in nodes] == [0, 0]
    assert numbers(apart) == numbers(alone)
    assert len(numbers(alone)) == 3


def start_script(
    folder: Path, hosts: Hosts, host: int, arguments: list[str], **env: str
) -> ForkedProcess:
    """Run `launch/multi_node.sh` on one host: what it would start is started as a fork.

    Its `torchrun` is a fake that writes down arguments and environment.
    """
    fake, said = folder / f"bin-{host}" / "torchrun", folder / f"torchrun-{host}"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=sys.executable, said=str(said)), encoding="utf-8")
    fake.chmod(0o755)
    node = {
        "NNODES": "2",
        "NODE_RANK": str(host),
        "MASTER_ADDR": hosts.address(0),
        "LOCAL_ADDR": hosts.address(host),
        "RANKS_PER_NODE": "2",
        "MAX_RESTARTS": "0",
        "GLOO_SOCKET_IFNAME": hosts.interfaces[host],
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
    }
    script = ["bash", str(ROOT / "launch" / "multi_node.sh"), *arguments]
    subprocess.run(script, cwd=ROOT, env=environment() | node | env, check=True, timeout=60)
    launch = json.loads(said.read_text(encoding="utf-8"))
    return ForkedProcess(
        LAUNCHER,
        launch["arguments"],
        ROOT,
        launch["environment"],
        stdout=None,
        stderr=None,
        network=hosts.names[host],
    )


FAKE = """#!{python}
import json, os, sys
with open({said!r}, "w", encoding="utf-8") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}, file)
"""


def numbers(run: Path) -> list[tuple[object, ...]]:
    """Return every line's loss, norm and counts; JSON keeps all digits of a float."""
    return [
        (line["step"], line["loss"], line["grad_norm"], str(line["aux"]))
        for line in events(run, "train")
    ]
