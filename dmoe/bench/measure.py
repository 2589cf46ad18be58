"""Rounds, quartiles and counters that all benchmarks share.

A round times every contender once, in an order that turns, so that what else the machine does
falls on all alike. Ratios are taken within a round; medians and quartiles are over the rounds.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Times = dict[str, list[float]]
"""Milliseconds of each contender, one per round."""
NO_KERNEL = {
    *("view", "_unsafe_view", "t", "transpose", "slice", "select", "expand", "unsqueeze"),
    *("squeeze", "alias", "detach", "split", "split_with_sizes", "chunk", "as_strided", "permute"),
    *("unbind", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("_reshape_alias", "diagonal", "is_same_size", "lift_fresh", "reshape"),
    "promote_types",
}
"""Operators that only make a view or allocate."""


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    warmup: int = 2,
    barrier: Callable[[], object] | None = None,
) -> Times:
    """Time every contender once per round, in an order that turns.

    Args:
        contenders: what to time, by name.
        rounds: rounds that count.
        device: waited for before and after each.
        warmup: rounds before those.
        barrier: waits for the other ranks; called before each.
    """
    times: Times = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(-warmup, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if barrier is not None:
                barrier()
            synchronize(device)
            start = time.perf_counter()
            contenders[name]()
            synchronize(device)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return low, middle, high


def summary(times: Times, baseline: str) -> list[dict[str, Any]]:
    """Return one row per contender: milliseconds and multiples of `baseline`, with quartiles."""
    rows = []
    for name, values in times.items():
        ratios = [value / bare for value, bare in zip(values, times[baseline], strict=True)]
        row: dict[str, Any] = {"name": name}
        for key, numbers in (("ms", values), ("ratio", ratios)):
            row[f"{key}_q1"], row[key], row[f"{key}_q3"] = quartiles(numbers)
        rows.append(row)
    return rows


def machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine by what sets its speed: processor, vector units, threads, torch."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = (line.partition(":") for line in lines)
    info = {name.strip(): value.strip() for name, _, value in fields}
    flags = info.get("flags", "").split()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": info.get("model name", platform.processor()),
        "features": [flag for flag in known if flag in flags],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that launch a kernel on a GPU, by name; a collective is one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    @property
    def count(self) -> int:
        """Launches so far."""
        return len(self.names)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if (name := function.overloadpacket.__name__) not in NO_KERNEL:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def saved_bytes(forward: Callable[[], object]) -> int:
    """Count the bytes that a forward keeps for its backward, parameters left out, each once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not (tensor.is_leaf and tensor.requires_grad):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until counted, so that no address is used twice
    total = sum(storages.values())
    del kept
    return total


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Measure how far a call raises the bytes that torch holds, at their peak."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
