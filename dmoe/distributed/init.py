"""Start and end of torch.distributed in this process. Without a launcher: rank 0 of 1, no group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from dmoe.config.errors import ConfigError, DmoeError
from dmoe.config.launch_env import LaunchEnv, read_launch_env


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
    host_size: int = 1
    """Number of ranks on this machine."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def send(self, tensor: Tensor) -> Tensor:
        """Copy a tensor of the host to the device; a GPU's from pinned memory, without waiting."""
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.device}"


def launched_world_size() -> int:
    """Return the world size of the process group or the launcher; 1 without either."""
    if dist.is_initialized():
        return dist.get_world_size()
    launch = read_launch_env()
    return launch.world_size if launch is not None else 1


def init_distributed(
    device: str = "auto", backend: str = "auto", timeout: float = 600.0
) -> ProcessInfo:
    """Join the process group of the launcher's environment; without a launcher start no group.

    Args:
        device: `auto | cpu | cuda`; cuda is the GPU of this process's local rank, or the only one
            that it sees.
        backend: `auto | gloo | nccl`.
        timeout: seconds any collective may wait, until `set_timeouts`.

    Raises:
        ConfigError: no CUDA device, fewer GPUs than local ranks, two ranks on one GPU with NCCL,
            the rendezvous port in use, or a launcher that is not supported.
    """
    set_cuda_environment()
    launch = _read_launch()
    own_device = _resolve_device(device, launch)
    own_backend = _resolve_backend(backend, own_device)
    if launch is None:
        return ProcessInfo(0, 1, 0, own_device)
    if not dist.is_initialized():
        _init_process_group(own_backend, launch, timedelta(seconds=timeout), own_device)
    return ProcessInfo(
        launch.rank,
        launch.world_size,
        launch.local_rank,
        own_device,
        launch.restart_count,
        in_group=True,
        host_size=launch.local_world_size,
    )


def _read_launch() -> LaunchEnv | None:
    """Return this process's rank; of the process group, if the caller has started one."""
    if not dist.is_initialized():
        return read_launch_env()
    names = ("LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    local_world_size, local_rank, restarts = (int(os.environ.get(name, "0")) for name in names)
    return LaunchEnv(
        dist.get_rank(), dist.get_world_size(), max(1, local_world_size), local_rank, restarts
    )


CUDA_ENVIRONMENT = {
    # A dropless layer has another number of rows in every step, which fragments fixed blocks.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # In the backward up to three communicators are in flight, on streams of their own. NCCL
    # promises progress only if all GPUs launch them in one order (nccl#522, nccl#1766): that of
    # the host, which is the same on all ranks.
    "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
    # Where ranks wait in different collectives, each writes its last ones to
    # TORCH_NCCL_DEBUG_INFO_TEMP_FILE (/tmp/nccl_trace_rank_N) when `parallel.timeout` ends.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
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


def available_backends() -> list[str]:
    """List what this torch, on this machine, can start a process group with."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    found = {"gloo": dist.is_gloo_available(), "nccl": nccl}
    return [name for name, available in found.items() if available]


def has_process_group() -> bool:
    """Return True if this process is in a process group."""
    return dist.is_initialized()


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
    backend: str, launch: LaunchEnv, timeout: timedelta, device: torch.device
) -> None:
    rank, world_size = launch.rank, launch.world_size
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
        store = PrefixStore(f"attempt-{launch.restart_count}", store)
    own_gpu = device if backend == "nccl" else None
    if own_gpu is not None and launch.local_world_size > 1:
        _check_own_gpu(store, launch, own_gpu)
    # With a device NCCL's communicators are made at once, and those of subgroups split from the
    # world's; without, each by a rendezvous in its first collective.
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=own_gpu,
        )
    except RuntimeError as error:
        if "unsupported gloo device" not in str(error):
            raise
        transport = os.environ.get("GLOO_DEVICE_TRANSPORT", "")[:40]
        allowed = "this torch's gloo has no such transport"
        raise ConfigError("GLOO_DEVICE_TRANSPORT", transport, allowed, "unset it") from None


def _check_own_gpu(store: Store, launch: LaunchEnv, device: torch.device) -> None:
    """Refuse a GPU that two ranks of this machine have; NCCL would, with a traceback.

    Collective over the ranks of this machine, which each see one GPU or all of them.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    first = launch.rank - launch.local_rank
    store.set(f"gpu/{launch.rank}", uuid)
    for rank in range(first, first + launch.local_world_size):
        if rank != launch.rank and store.get(f"gpu/{rank}").decode() == uuid:
            raise ConfigError(
                "train.device",
                "cuda",
                f"ranks {min(rank, launch.rank)} and {max(rank, launch.rank)} see the same GPU",
                "start one rank per GPU",
            )


def _resolve_device(device: str, launch: LaunchEnv | None) -> torch.device:
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not visible):
        return torch.device("cpu")
    if not visible:
        raise ConfigError(
            "train.device", device, "no CUDA device is visible", "use train.device=cpu or auto"
        )
    local_rank, local_world_size = 0, 1
    if launch is not None:
        local_rank, local_world_size = launch.local_rank, launch.local_world_size
    if visible == 1:
        local_rank = 0  # the launcher shows each rank its own: srun --gpus-per-task=1, Kubernetes
    elif local_world_size > visible:
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
