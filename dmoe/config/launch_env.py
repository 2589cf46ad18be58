"""The launcher's environment variables and the machine's resources, checked before torch starts.

torchrun, accelerate launch and a replica of a PyTorchJob set `RANK`, `WORLD_SIZE`, `MASTER_ADDR`
and `MASTER_PORT` per process; the first two also `LOCAL_RANK` and `LOCAL_WORLD_SIZE`, without which
a process is the only one of its machine. If only some are set (a common mistake by hand), torch
would wait minutes for ranks that do not exist. Other launchers (mpirun, plain srun) set variables
of their own; a process that they start among others is refused, or each would train alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.yaml_guard import not_utf8

FIX = "start it with torchrun, or unset WORLD_SIZE"
FOREIGN_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
    "MV2_COMM_WORLD_SIZE": "mpirun of MVAPICH",
    "PMI_SIZE": "mpirun or srun",
    "PMIX_SIZE": "prun or srun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""The world size under launchers that set neither RANK nor MASTER_ADDR, and their names."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Variables that name network interfaces exactly, separated by commas."""
PREFIXES = (
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "DEEPSPEED_", "XLA_"),
    *("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
)
VARIABLES = (
    *("FORK_LAUNCHED", "USE_TORCH_XLA", "PT_HPU_LAZY_MODE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
"""Variables by which a run's numbers would differ from its config: of accelerate, of MPI, and those
that let torch's libraries compute float32 products in less."""
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Device files of the drivers of NVIDIA, of AMD, and of the Windows Subsystem for Linux."""


@dataclass(frozen=True)
class LaunchEnv:
    """Rank of this process, as set by a launcher."""

    rank: int
    world_size: int
    local_world_size: int
    """Number of ranks on this machine."""
    local_rank: int = 0
    restart_count: int = 0
    """Number of times the launcher has restarted this job."""


def read_launch_env(environment: Mapping[str, str] = os.environ) -> LaunchEnv | None:
    """Read the launcher's variables; None without a launcher.

    Raises:
        ConfigError: a variable that is missing or out of range, a launcher that is not supported,
            or a network interface that does not exist.
    """
    check_environment(environment)
    if "WORLD_SIZE" not in environment:
        _refuse_foreign_launchers(environment)
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if name in environment:  # rank 1 of 1 would write nothing, LOCAL_RANK picks a GPU
                allowed = "must not be set without WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT"
                fix = f"start it with torchrun, or unset {name}"
                raise ConfigError(name, environment[name][:40], allowed, fix)
        return None
    world_size = _integer(environment, "WORLD_SIZE", 1, 1 << 20)
    rank = _integer(environment, "RANK", 0, world_size - 1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(name, "", f"must be set with WORLD_SIZE={world_size}", FIX)
    if shown := not_utf8(environment["MASTER_ADDR"]):
        raise ConfigError("MASTER_ADDR", shown[:40], "must be UTF-8 text", FIX)
    _integer(environment, "MASTER_PORT", 0, 65535)
    local_rank, local_world_size, restart_count = 0, 1, 0
    if "LOCAL_RANK" in environment:
        local_rank = _integer(environment, "LOCAL_RANK", 0, rank)
    if "LOCAL_WORLD_SIZE" in environment:
        local_world_size = _integer(environment, "LOCAL_WORLD_SIZE", 1, world_size)
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        restart_count = _integer(environment, "TORCHELASTIC_RESTART_COUNT", 0, 1 << 20)
    return LaunchEnv(rank, world_size, local_world_size, local_rank, restart_count)


def clear_environment(keep: Collection[str] = ()) -> list[str]:
    """Remove what the config decides from this process's environment; return the names.

    Before torch is imported (it reads one of them then) with `keep=FOREIGN_LAUNCHERS`, which
    `read_launch_env` has still to see; again, all of them, before accelerate reads them.
    """
    names = [name for name in os.environ if name.startswith(PREFIXES) or name in VARIABLES]
    removed = [name for name in names if name not in keep]
    for name in removed:
        del os.environ[name]
    return removed


def _refuse_foreign_launchers(environment: Mapping[str, str]) -> None:
    """Refuse a process that another launcher started as one of several ranks."""
    for name, launcher in FOREIGN_LAUNCHERS.items():
        text = environment.get(name, "").strip()
        if text and text != "1":
            allowed = f"{launcher} has started several processes, and each would train alone"
            fix = "use torchrun or launch/slurm.sbatch, or unset it for a run of one process"
            raise ConfigError(name, text[:40], allowed, fix)


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse values at which torch would end with a traceback.

    Raises:
        ConfigError: a network interface that does not exist, a debug level that torch has not.
    """
    level = environment.get("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if level.upper() not in ("OFF", "INFO", "DETAIL"):
        allowed = "must be OFF, INFO or DETAIL"
        raise ConfigError("TORCH_DISTRIBUTED_DEBUG", level[:40], allowed, "correct it or unset it")
    known = [name for _, name in socket.if_nameindex()]
    for variable in INTERFACES:
        for name in filter(None, environment.get(variable, "").split(",")):
            if name not in known:
                allowed = f"must name a network interface of this machine: {', '.join(known)}"
                raise ConfigError(variable, name[:40], allowed, "correct it or unset it")


def refuse_debug_detail(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse the debug level at which torch's DDP ends in a segmentation fault over gloo.

    Its logger casts the group that DETAIL wraps around gloo's (torch 2.13).

    Raises:
        ConfigError: TORCH_DISTRIBUTED_DEBUG is DETAIL.
    """
    level = environment.get("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if level.upper() == "DETAIL":
        allowed = "must be OFF or INFO: torch's DDP ends in a segmentation fault over gloo"
        fix = "use INFO and debug.collectives=true, or parallel.mode=fsdp"
        raise ConfigError("TORCH_DISTRIBUTED_DEBUG", level, allowed, fix)


def has_accelerator() -> bool:
    """Return whether an accelerator's driver is there; only torch knows whether it can use it."""
    return any(Path(device).exists() for device in ACCELERATORS)


def main_memory() -> int:
    """Return the bytes of memory this process may use: the machine's, or its container's."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Without a control group, or with the limit `max`, only the machine limits it.
    with suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return memory


def _integer(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment.get(name, "")
    if not text:
        raise ConfigError(name, "", f"must be set with WORLD_SIZE={environment['WORLD_SIZE']}", FIX)
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and least <= int(text) <= most):
        raise ConfigError(name, text[:40], f"must be a whole number from {least} to {most}", FIX)
    return int(text)
