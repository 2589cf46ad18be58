"""The surviving ranks name a lost rank. Four gloo processes; one kills or stops itself in a step.

gloo names no rank: after SIGSTOP "Timed out waiting", after SIGKILL "Connection closed by peer
[127.0.0.1]:4711". In the ring of an all-reduce the rank opposite a dead one notices nothing until a
neighbour leaves: if ranks answered only after their own failure, it would be named too.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from dmoe.distributed.rank_failure import is_collective_failure
from tests.forked import ForkedProcess

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
TIMEOUT = 3.0


@contextmanager
def store_of(keeper: str) -> Iterator[dict[str, str]]:
    """Yield the environment of ranks whose store the launcher (this process) or rank 0 owns."""
    if keeper == "launcher":
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        yield {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def survivors(
    world: int, operation: str, fault: str, victim: int, keeper: str = "launcher"
) -> dict[int, dict[str, Any]]:
    """Return the answer of each rank except `victim`."""
    with store_of(keeper) as environment:
        arguments = [operation, fault, str(victim), str(TIMEOUT)]
        everywhere = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
        ranks = [
            ForkedProcess(
                "tests.distributed.losing_rank",
                arguments,
                ROOT,
                os.environ | environment | everywhere | {"RANK": str(n), "LOCAL_RANK": str(n)},
            )
            for n in range(world)
        ]
        try:
            told = {
                rank: ranks[rank].communicate(timeout=150)
                for rank in range(world)
                if rank != victim
            }
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.communicate()
    for rank, (out, problem) in told.items():
        assert out, f"rank {rank}: {problem}"
        assert ranks[rank].returncode == 1, f"rank {rank}: {problem}"
    return {rank: json.loads(out) for rank, (out, _) in told.items()}


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        ("SIGSTOP", "all_reduce"),
        ("SIGSTOP", "all_to_all"),
        ("SIGSTOP", "backward"),
        ("SIGKILL", "all_reduce"),
    ],
)
def test_the_survivors_name_the_missing_rank_and_no_other(operation: str, fault: str) -> None:
    for rank, answer in survivors(4, operation, fault, victim=1).items():
        assert answer["said"].startswith(f"rank {rank} lost rank 1 in step 12 after "), answer
        assert "(the rank is dead, frozen or cut off): " in answer["said"]
        assert "gloo/" not in answer["said"]
        assert answer["seconds"] < TIMEOUT + 8, (
            answer
        )  # the time-out, 1 s, and 7 s for a busy machine


@pytest.mark.parametrize("fault", ["SIGSTOP", "SIGKILL"])
def test_a_lost_store_is_named_by_its_owner(fault: str) -> None:
    """A call to a frozen store blocks for 60 s, which must not delay the message."""
    answers = survivors(2, "all_reduce", fault, victim=0, keeper="rank 0")
    assert answers[1]["said"].startswith(
        "rank 1 lost rank 0, which keeps the store at 127.0.0.1:"
    ), answers
    assert answers[1]["seconds"] < TIMEOUT + 8, answers


def test_rank_0_keeps_the_store_until_the_others_have_asked() -> None:
    for rank, answer in survivors(4, "all_reduce", "SIGKILL", victim=1, keeper="rank 0").items():
        assert answer["said"].startswith(f"rank {rank} lost rank "), answer
        assert rank == 3 or answer["said"].startswith(f"rank {rank} lost rank 1 in step"), answer


def test_a_rank_that_is_only_late_is_not_called_dead() -> None:
    for rank, answer in survivors(3, "all_reduce", "late", victim=1).items():
        assert answer["said"].startswith(f"rank {rank} lost its connection to a rank in step 12"), (
            answer
        )
        assert "all ranks answer" in answer["said"]


def test_other_errors_are_not_collective_failures() -> None:
    with pytest.raises(RuntimeError) as shapes:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_collective_failure(shapes.value)
    assert not is_collective_failure(RuntimeError("the gloo back-end is not built in"))
    assert not is_collective_failure(KeyError("[gloo/transport/tcp/pair.cc:553] Connection closed"))
    assert is_collective_failure(torch.distributed.DistBackendError("NCCL error"))
