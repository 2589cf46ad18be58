"""This process among the others: start, time-outs, clean end. Rank 0 of 1 where nothing was initialised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from dmoe.config.errors import ConfigError, DmoeError


@dataclass(frozen=True)
class ProcessInfo:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    restart_count: int = 0
    """How many times the launcher has restarted this job."""

    in_group: bool = False
    """Whether a process group exists: always with a launcher, even a launcher of one rank."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.device}"


def launched_world_size() -> int:
    """The world size that torchrun, accelerate launch or Slurm put into the environment; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed(
    device: str = "auto", backend: str = "auto", timeout: float = 600.0
) -> ProcessInfo:
    """Join the other ranks that the launcher's environment names; a process without a launcher starts no group.

    Args:
        device: `auto | cpu | cuda`; cuda takes the GPU of this process's local rank.
        backend: `auto | gloo | nccl`.
        timeout: seconds any collective may wait, until `shorten_timeouts`.

    Raises:
        ConfigError: CUDA asked for and not there, fewer GPUs than local ranks, or the rendezvous port taken.
    """
    size, rank, local = (
        launched_world_size(),
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )
    where = _device(device, local)
    library = _backend(backend, where)
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _join(library, rank, size, restart, timedelta(seconds=timeout))
    return ProcessInfo(rank, size, local, where, restart, dist.is_initialized())


def shutdown() -> None:
    """Leave together: without the barrier a finished rank can be killed by a peer's closed socket and fail the job."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def elastic_run_id() -> str | None:
    """The name that torch's elastic launcher gives this job, the same after a restart; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def run_on_rank0(process: ProcessInfo, action: Callable[[], str]) -> str:
    """Run `action` on rank 0 and return its text on every rank. Collective: one broadcast of 4 KiB.

    Raises: what rank 0 raised, if that is a DmoeError; on the other ranks one with the same text and exit code.
    """
    answer, problem = "", None
    if process.is_main:
        try:
            answer = action()
        except DmoeError as error:
            problem = error
    said = (
        {"answer": answer}
        if problem is None
        else {"code": problem.exit_code, "text": str(problem)[:600]}
    )
    heard = json.loads(_from_first(json.dumps(said), process.device))
    if "code" not in heard:
        return str(heard["answer"])
    if problem is None:
        problem = DmoeError(heard["text"])
        problem.exit_code = heard["code"]
    raise problem


def _from_first(text: str, device: torch.device) -> str:
    """Rank 0's `text` on every rank (ASCII, under 4 KiB)."""
    if not dist.is_initialized():
        return text
    encoded = text.encode("ascii")
    assert len(encoded) < 4096, "text too long to agree on"
    data = torch.zeros(4096, dtype=torch.uint8)
    data[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    data = data.to(device)
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).rstrip(b"\0").decode("ascii")


def set_timeouts(groups: list[dist.ProcessGroup], seconds: float) -> None:
    """After the first step nothing legitimate takes minutes any more (torch's own default is half an hour)."""
    for group in groups:
        _set_pg_timeout(timedelta(seconds=seconds), group)


def _join(backend: str, rank: int, size: int, restart: int, timeout: timedelta) -> None:
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        problem = "is in use" if "EADDRINUSE" in str(error) else f"cannot be reached at {address}"
        raise ConfigError(
            "MASTER_PORT",
            port,
            f"the port {problem}",
            "pass another --master-port to torchrun or --port to dmoe train",
        ) from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # A restart by torchrun finds the dead ranks' addresses in the agent's store and gloo cannot connect (torch 2.13 and 2.14:
        # "connectFullMesh failed"); a prefix of its own gives every attempt a clean page. Remove when torch does so itself.
        # Across machines the restart count can differ, so launch/multi_node.sh has torchrun share no store in the first place.
        store = PrefixStore(f"attempt-{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _device(device: str, local_rank: int) -> torch.device:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not visible):
        return torch.device("cpu")
    if not visible:
        raise ConfigError(
            "train.device", device, "no CUDA device is visible", "use train.device=cpu or auto"
        )
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > visible:
        raise ConfigError(
            "train.device",
            device,
            f"{wanted} ranks on this machine and {visible} GPUs visible",
            f"start {visible} ranks",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _backend(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            "parallel.backend", backend, "NCCL needs CUDA devices", "use gloo or auto"
        )
    return backend
