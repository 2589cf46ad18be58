"""`train.profile_steps`: a torch profiler trace of chosen steps and ranks, for chrome://tracing or ui.perfetto.dev.

The parts of every MoE layer carry the names of `dmoe.moe.stage`: route, dispatch, exchange, experts, combine. A step that is profiled
is slower by tens of percent; the others run as if there were no profiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Profiling:
    """Which steps of this rank are profiled, and where their traces go. Ranks that are not chosen only take part in the step."""

    def __init__(
        self,
        steps: Sequence[int],
        ranks: Sequence[int],
        rank: int,
        folder: Path,
        tell: Callable[[str], None],
        exclude: Callable[[float], None] = lambda began: None,
    ) -> None:
        """`steps` count from 1, as in metrics.jsonl; no `ranks` at all means every rank. `tell` gets a line for each trace.

        `exclude` is told when writing a trace began (`time.monotonic`): that is no training, and must not count in its speed.
        """
        self.exclude = exclude
        chosen = not ranks or rank in ranks
        self.steps, self.rank, self.folder, self.tell = (
            set(steps) if chosen else set(),
            rank,
            folder,
            tell,
        )

    def around(self, step: int) -> AbstractContextManager[None]:
        """Around one step. No collective."""
        return self._profiled(step) if step in self.steps else nullcontext()

    @contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        activities = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
        ]
        with profile(activities=activities) as profiler:
            yield
            began = time.monotonic()
        path = trace_path(self.folder, step, self.rank)
        partial = path.with_name(f".{path.name}")  # until it is whole: a viewer refuses half a JSON
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except OSError as error:  # a trace is no reason to lose the run
            self.tell(f"no trace of step {step}: {path} cannot be written ({error.strerror})")
        else:
            self.tell(f"trace of step {step}: {path} (open it at ui.perfetto.dev)")
        self.exclude(began)


def trace_path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"trace-step{step:06d}-rank{rank}.json"
