"""What a launcher left in the environment, and what the machine has: read and checked before torch starts.

torchrun, accelerate launch and Slurm scripts tell each rank who it is by `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`,
`MASTER_ADDR` and `MASTER_PORT`. Half of them set by hand is a common slip: torch would wait minutes for ranks that do not exist.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dmoe.config.errors import ConfigError

FIX = "start it with torchrun, or unset WORLD_SIZE"
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA's driver, of AMD's, and of Windows' subsystem for Linux."""


@dataclass(frozen=True)
class Launched:
    """Which of how many ranks this process is."""

    rank: int
    world: int
    local: int
    """Ranks on this machine."""


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """What the launcher says, or None without one. Raises: ConfigError for a part that is missing or is no such number."""
    if "WORLD_SIZE" not in environment:
        return None
    world = _number(environment, "WORLD_SIZE", 1, 1 << 20)
    rank = _number(environment, "RANK", 0, world - 1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ConfigError(name, "", f"must be set with WORLD_SIZE={world}", FIX)
    _number(environment, "MASTER_PORT", 0, 65535)
    if "LOCAL_RANK" in environment:
        _number(environment, "LOCAL_RANK", 0, rank)
    local = (
        _number(environment, "LOCAL_WORLD_SIZE", 1, world)
        if "LOCAL_WORLD_SIZE" in environment
        else 1
    )
    return Launched(rank, world, local)


def has_accelerator() -> bool:
    """Whether a driver for one is there; whether torch can use it, only torch knows."""
    return any(Path(device).exists() for device in ACCELERATORS)


def main_memory() -> int:
    """Bytes this process may have: the machine's, or its container's."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no control group, or `max`: no limit but the machine's
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return memory


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment.get(name, "")
    if not text:
        raise ConfigError(name, "", f"must be set with WORLD_SIZE={environment['WORLD_SIZE']}", FIX)
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and least <= int(text) <= most):
        raise ConfigError(name, text[:40], f"must be a whole number from {least} to {most}", FIX)
    return int(text)
