"""The checks of both halves, in their order, and the loop that runs them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu_check import layers, performance, start, training
from benchmarks.gpu_check.checks import Check, Machine, Row

DEADLINE = 225.0
"""Seconds of a half after which no check is started."""


@dataclass(frozen=True)
class Listed:
    """A check: `first` or `second` half, and whether there is nothing to run without a GPU."""

    half: str
    function: Check
    needs_gpu: bool = False


CHECKS = {
    "versions": Listed("first", start.versions),
    "launched": Listed("first", start.launched),
    "same_losses": Listed("first", start.same_losses),
    "layers": Listed("first", layers.layers),
    "triton_kernels": Listed("first", layers.triton_kernels, needs_gpu=True),
    "grouped_gemm": Listed("first", layers.grouped_gemm),
    "determinism": Listed("first", start.determinism),
    "host_syncs": Listed("first", performance.host_syncs, needs_gpu=True),
    "qk_norm": Listed("first", layers.qk_norm),
    "verify": Listed("second", training.verify),
    "resume": Listed("second", training.resume),
    "staging": Listed("second", performance.staging),
    "fp16": Listed("second", training.fp16, needs_gpu=True),
    "two_ranks": Listed("second", training.two_ranks),
    "memory": Listed("second", performance.memory, needs_gpu=True),
    "speed": Listed("second", performance.speed),
    "trace": Listed("second", performance.trace, needs_gpu=True),
}


def run_checks(machine: Machine, names: list[str], deadline: float) -> Iterator[Row]:
    """Yield the rows of the checks; one that raises is a row that failed."""
    for name in names:
        listed = CHECKS[name]
        if listed.needs_gpu and machine.device != "cuda":
            yield Row(name, "", "not run", "a GPU", None)
            continue
        if time.monotonic() > deadline:
            yield Row(name, "", "not run: out of time", "", None)
            continue
        start = time.monotonic()
        try:
            for label, got, wanted, ok in listed.function(machine):
                yield Row(name, label, str(got), wanted, ok)
        except Exception as error:
            traceback.print_exc()
            yield Row(
                name,
                "raised",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "no error",
                False,
            )
        yield Row(name, "seconds", f"{time.monotonic() - start:.1f}", "", None)
        if machine.device == "cuda":
            torch.cuda.empty_cache()
