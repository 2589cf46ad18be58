"""Start and end of torch.distributed in this process. Without a launcher: rank 0 of 1, no group."""

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
from dmoe.config.launch_env import read_launch_env


@dataclass(frozen=True)
class ProcessInfo:
    """This process: rank, world size, device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    restart_count: int = 0
    """Number of times the launcher has restarted this job."""

    in_group: bool = False
    """True if a process group exists: always with a launcher, even for one rank."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.device}"


def launched_world_size() -> int:
    """Read the world size that torchrun, accelerate or Slurm has set; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed(
    device: str = "auto", backend: str = "auto", timeout: float = 600.0
) -> ProcessInfo:
    """Join the process group of the launcher's environment; without a launcher start no group.

    Args:
        device: `auto | cpu | cuda`; cuda is the GPU of this process's local rank.
        backend: `auto | gloo | nccl`.
        timeout: seconds any collective may wait, until `set_timeouts`.

    Raises:
        ConfigError: no CUDA device, fewer GPUs than local ranks, the rendezvous port in use, or a
            launcher that is not supported.
    """
    if not dist.is_initialized():
        read_launch_env()  # the command has asked already; a caller from Python has not
    world_size, rank = launched_world_size(), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    set_cuda_environment()
    own_device = _resolve_device(device, local_rank)
    own_backend = _resolve_backend(backend, own_device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        limit = timedelta(seconds=timeout)
        _init_process_group(own_backend, rank, world_size, restart_count, limit)
    return ProcessInfo(
        rank, world_size, local_rank, own_device, restart_count, dist.is_initialized()
    )


CUDA_ENVIRONMENT = {
    # A dropless layer has another number of rows in every step, which fragments fixed blocks.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Environment variables of CUDA and NCCL that differ from their defaults."""


def set_cuda_environment() -> None:
    """Set `CUDA_ENVIRONMENT` where the user has set nothing. Before CUDA starts."""
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # the older name of PYTORCH_ALLOC_CONF
        os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ["PYTORCH_CUDA_ALLOC_CONF"])
    for name, value in CUDA_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def shutdown() -> None:
    """Leave the process group after a barrier, so that no rank fails on a peer's closed socket."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks, if there is a process group."""
    if dist.is_initialized():
        dist.barrier()


def elastic_run_id() -> str | None:
    """Return the elastic launcher's name of this job, unchanged by a restart; None without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run_id == "none" else run_id


def run_on_rank0(process: ProcessInfo, action: Callable[[], str]) -> str:
    """Run `action` on rank 0 and return its text on every rank. Collective: one broadcast of 4 KiB.

    Raises:
        DmoeError: what rank 0 raised; on the other ranks one with the same text and exit code.
    """
    text, error = "", None
    if process.is_main:
        try:
            text = action()
        except DmoeError as raised:
            error = raised
    outcome: dict[str, object] = {"text": text}
    if error is not None:
        outcome = {"exit_code": error.exit_code, "text": str(error)[:600]}
    received = json.loads(_broadcast_text(json.dumps(outcome), process.device))
    if "exit_code" not in received:
        return str(received["text"])
    if error is None:
        error = DmoeError(received["text"])
        error.exit_code = received["exit_code"]
    raise error


def _broadcast_text(text: str, device: torch.device) -> str:
    """Return rank 0's `text` on every rank (ASCII, under 4 KiB)."""
    if not dist.is_initialized():
        return text
    encoded = text.encode("ascii")
    assert len(encoded) < 4096, "text too long to broadcast"
    buffer = torch.zeros(4096, dtype=torch.uint8)
    buffer[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    buffer = buffer.to(device)
    dist.broadcast(buffer, src=0)
    return bytes(buffer.tolist()).rstrip(b"\0").decode("ascii")


def set_timeouts(groups: list[dist.ProcessGroup], seconds: float) -> None:
    """Set the time-out of collectives: after the first step none takes minutes any more."""
    for group in groups:
        _set_pg_timeout(timedelta(seconds=seconds), group)


def _init_process_group(
    backend: str, rank: int, world_size: int, restart_count: int, timeout: timedelta
) -> None:
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
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
        # After a restart by torchrun the agent's store still holds the dead ranks' addresses, and
        # gloo fails ("connectFullMesh failed", torch 2.13 and 2.14). A prefix per attempt avoids
        # that; remove it when torch does so itself. Across machines the restart count can differ:
        # launch/multi_node.sh therefore tells torchrun not to share a store.
        store = PrefixStore(f"attempt-{restart_count}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _resolve_device(device: str, local_rank: int) -> torch.device:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not visible):
        return torch.device("cpu")
    if not visible:
        raise ConfigError(
            "train.device", device, "no CUDA device is visible", "use train.device=cpu or auto"
        )
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_world_size > visible:
        raise ConfigError(
            "train.device",
            device,
            f"{local_world_size} ranks on this machine and {visible} GPUs visible",
            f"start {visible} ranks",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _resolve_backend(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError(
            "parallel.backend", backend, "NCCL needs CUDA devices", "use gloo or auto"
        )
    return backend
