"""Checks of one machine: versions, devices, back-ends, cores, memory, limits, ports.

Nothing here is collective, and nothing is changed.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.version import Version

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import has_accelerator, main_memory, refuse_debug_detail
from dmoe.config.shipped import tested_versions
from dmoe.doctor.findings import Finding, in_gib, judge

MIN_OPEN_FILES = 256
USUAL_OPEN_FILES = 4096
NCCL_SHARED_MEMORY = 1 << 30
"""A container's default of 64 MB ends NCCL's ranks of one machine with a bus error."""
PROCESSES_PER_RANK = 64
"""Threads count as processes: torch, gloo and NCCL start some tens per rank."""
SIMD = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")


def check_machine(ranks: int) -> list[Finding]:
    """Check what `ranks` ranks on this machine need.

    Args:
        ranks: processes that will run on this machine.
    """
    return [
        *_versions(),
        *_devices(ranks),
        _backends(),
        _cores(ranks),
        _memory(ranks),
        _shared_memory(),
        *_limits(ranks),
        _debug_level(),
        _loopback(),
    ]


def _versions() -> list[Finding]:
    """Compare with the bounds of the installed dmoe, and with the versions it was tested with."""
    found = [judge("python", platform.python_version())]
    tested = tested_versions()
    for text in metadata.requires("dmoe") or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            fix = f"pip install '{need.name}{need.specifier}'"
            found.append(judge(need.name, "not installed", failed=fix))
            continue
        if not need.specifier.contains(have, prereleases=True):
            fix = f"pip install '{need.name}{need.specifier}'"
            found.append(judge(need.name, f"{have}, needs {need.specifier}", failed=fix))
        elif (right := tested.get(need.name)) and Version(right).release[:2] != Version(
            have
        ).release[:2]:
            fix = f"tested with {right}; with trouble, pip install '{need.name}=={right}'"
            found.append(judge(need.name, have, warning=fix))
        else:
            found.append(judge(need.name, have))
    return found


def _devices(ranks: int) -> list[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        flags = _cpu_flags()
        simd = next((name for name in SIMD if name in flags), "no SIMD that is known")
        cpu = judge("devices", f"CPU with {simd}; no GPU")
        if has_accelerator():
            fix = (
                "install a torch built for its driver (nvidia-smi shows which), or mend the driver"
            )
            text = f"a GPU's driver is there, but torch {torch.__version__} cannot use it"
            return [judge("devices", text, warning=fix)]
        return [cpu]
    found = []
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{gpu.name}, {in_gib(free)} of {in_gib(total)} free"
        busy = "another process holds its memory; nvidia-smi names it" if free < 0.9 * total else ""
        old = "has no bf16: set train.precision=fp32 or fp16" if gpu.major < 8 else ""
        found.append(judge(f"GPU {index}", text, warning=busy or old))
    if ranks > count > 1:
        fix = f"start {count} ranks per machine"
        found.append(judge("GPUs", f"{count} for {ranks} ranks", failed=fix))
    return found


def _cpu_flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split())
    return set()


def _backends() -> Finding:
    there = [n for n, has in (("gloo", dist.is_gloo_available()), ("nccl", _has_nccl())) if has]
    if not there:
        return judge("back-ends", "none", failed="install a torch with gloo")
    no_nccl = torch.cuda.is_available() and "nccl" not in there
    fix = "GPUs need NCCL: install torch's Linux wheel with CUDA" if no_nccl else ""
    return judge("back-ends", ", ".join(there), failed=fix)


def _has_nccl() -> bool:
    return torch.cuda.is_available() and dist.is_nccl_available()


def _cores(ranks: int) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota()
    usable = min(float(cores or 1), quota)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    text = f"{usable:g} for {ranks} ranks" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if usable < ranks:
        fix = "give the job more cores (Slurm: --cpus-per-task), or start fewer ranks"
    elif threads.isdecimal() and int(threads) * ranks > usable:
        fix = f"set OMP_NUM_THREADS={max(1, int(usable // ranks))}"
    else:
        fix = ""
    return judge("cores", text, warning=fix)


def _cpu_quota() -> float:
    """Return the processors that the control group grants; infinite without a limit."""
    with suppress(OSError, ValueError):
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return float(limit) / float(period)
    return float("inf")


def _memory(ranks: int) -> Finding:
    usable = main_memory()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        usable = min(usable, int(line.split()[1]) * 1024)
    # torch and its libraries take this much in each rank before a model is built
    needed = ranks * (1 << 29)
    fix = "start fewer ranks, or free memory" if usable < needed else ""
    return judge("memory", f"{in_gib(usable)} free of {in_gib(main_memory())}", warning=fix)


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return judge("shared memory", "no /dev/shm", warning="NCCL needs it; mount a tmpfs there")
    small = torch.cuda.is_available() and free < NCCL_SHARED_MEMORY
    fix = "start the container with --ipc=host or --shm-size=8g" if small else ""
    return judge("shared memory", f"{in_gib(free)} free", warning=fix)


def _limits(ranks: int) -> list[Finding]:
    found = []
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "open files" if hard == resource.RLIM_INFINITY else f"open files {hard}"
    low = hard != resource.RLIM_INFINITY and hard
    failed = f"ulimit -Hn {USUAL_OPEN_FILES}" if low and low < MIN_OPEN_FILES else ""
    warning = f"ulimit -Hn {USUAL_OPEN_FILES}" if low and low < 1024 else ""
    found.append(judge("limits", text, failed=failed, warning=warning))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < ranks * PROCESSES_PER_RANK:
        fix = f"ulimit -u {ranks * PROCESSES_PER_RANK} or more"
        found.append(judge("limits", f"processes and threads {soft}", warning=fix))
    for name, kind in (("address space", "AS"), ("file size", "FSIZE"), ("data segment", "DATA")):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))
        if soft != resource.RLIM_INFINITY:
            flag = {"AS": "-v", "FSIZE": "-f", "DATA": "-d"}[kind]
            fix = f"ulimit {flag} unlimited: a run may need more"
            found.append(judge("limits", f"{name} {in_gib(soft)}", warning=fix))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        fix = "InfiniBand needs ulimit -l unlimited"
        found.append(judge("limits", f"locked memory {in_gib(locked)}", warning=fix))
    return found


def _debug_level() -> Finding:
    try:
        refuse_debug_detail()
    except ConfigError as error:
        return judge("environment", str(error), failed="see the sentence")
    return judge("environment", "no variable that torch or gloo would fail on")


def _loopback() -> Finding:
    """Bind a free port and reach it, as the ranks of one machine do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                pass
    except OSError as error:
        fix = "allow connections to 127.0.0.1 (ip link set lo up)"
        return judge("ports", f"loopback fails: {error.strerror or error}", failed=fix)
    return judge("ports", "a free port can be bound and reached on loopback", **_master_port())


def _master_port() -> dict[str, str]:
    """Say if MASTER_PORT, set by hand without a launcher, is taken."""
    port = os.environ.get("MASTER_PORT", "")
    if "WORLD_SIZE" in os.environ or not port.isdecimal():
        return {}
    try:
        with socket.create_server(("", int(port))):
            return {}
    except (OSError, OverflowError):
        return {"warning": f"MASTER_PORT={port} is in use; choose another"}
