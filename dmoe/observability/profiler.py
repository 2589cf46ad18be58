"""Profiler traces of chosen steps (`train.profile_steps`), measured peak FLOP/s, peak memory.

A trace is a JSON file for chrome://tracing or ui.perfetto.dev. The stages of every MoE layer have
the names of `dmoe.moe.dispatch`: route, dispatch, exchange, experts, combine. A profiled step is
slower by tens of percent; the other steps run without a profiler.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIZES = {"cpu": 1024, "cuda": 4096}
"""Large enough to be limited by arithmetic, small enough to take milliseconds."""
PEAK_SECONDS = 0.15
PROCESS_STATUS = Path("/proc/self/status")


class StepProfiler:
    """Profiles chosen steps on chosen ranks and writes their traces."""

    def __init__(
        self,
        steps: Sequence[int],
        ranks: Sequence[int],
        rank: int,
        folder: Path,
        notify: Callable[[str], None],
        exclude: Callable[[float], None] = lambda began: None,
    ) -> None:
        """Choose the steps.

        Args:
            steps: steps to profile, counted from 1 as in metrics.jsonl.
            ranks: ranks to profile; all if empty.
            rank: this rank.
            folder: directory of the traces.
            notify: receives one line per trace.
            exclude: receives the time (`time.monotonic`) when writing a trace began: time to
                exclude from the training speed.
        """
        self.steps = set(steps) if not ranks or rank in ranks else set()
        self.rank, self.folder, self.notify, self.exclude = rank, folder, notify, exclude

    def profile(self, step: int) -> AbstractContextManager[None]:
        """Return a context around one step. No collective."""
        return self._profile(step) if step in self.steps else nullcontext()

    @contextmanager
    def _profile(self, step: int) -> Iterator[None]:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            yield
            began = time.monotonic()
        path = trace_path(self.folder, step, self.rank)
        # Renamed when complete: viewers refuse an incomplete JSON file.
        partial = path.with_name(f".{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        # A missing trace must not stop the run.
        except OSError as error:
            self.notify(f"no trace of step {step}: {path} cannot be written ({error.strerror})")
        else:
            self.notify(f"trace of step {step}: {path} (open it at ui.perfetto.dev)")
        self.exclude(began)


def trace_path(folder: Path, step: int, rank: int) -> Path:
    """Return the file of one trace."""
    return folder / f"trace-step{step:06d}-rank{rank}.json"


def measure_peak_flops(device: torch.device, precision: str) -> float:
    """Measure the FLOP/s of the fastest square matrix product in this precision, for 0.15 s.

    Not a data sheet's figure: CPUs have none, and GPUs do not reach it under their power limit.
    On a CPU all ranks measure at the same time, so they share cores as in training.
    """
    size = MATRIX_SIZES.get(device.type, MATRIX_SIZES["cuda"])
    left, right = (torch.ones(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(left)
    best, began = 0.0, time.monotonic()
    while best == 0.0 or time.monotonic() - began < PEAK_SECONDS:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux. `getrusage` there includes the process before it started Python.
    if PROCESS_STATUS.exists():
        lines = PROCESS_STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        peak = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if peak:
            return int(peak[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
