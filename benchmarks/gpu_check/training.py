"""Whole runs: `dmoe verify`, resuming, fp16, two ranks on one GPU."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import torch

from benchmarks.gpu_check.checks import Found, Machine, apart, limited
from benchmarks.gpu_check.runs import fresh_accelerate, run_steps, torchrun
from dmoe.checkpoint import list_steps
from dmoe.checkpoint import verify as verify_checkpoint
from dmoe.config.load import load
from dmoe.train.run import train


def verify(machine: Machine) -> Found:
    """`dmoe verify --device`: one GPU against the naive layers on the CPU, in both precisions."""
    from dmoe.verify.verify import verify as verify_config

    for dtype in ("float32",) if machine.dry else ("float64", "float32"):
        config = load(None, ["moe.capacity.factor=1.25", "model.layers=2"])
        report = verify_config(config, [1], dtype=dtype, device=machine.device)
        first = report.first
        got = "equal" if first is None else f"{first.quantity} in {first.case}: {first.where}"
        yield f"{dtype}, {len(report.cases)} cases", got, "equal", report.ok


def resume(machine: Machine) -> Found:
    """Half of the steps, then the rest in another process's place, against all of them at once."""
    half = machine.size(10, 2)
    found = {}
    ways = {"whole": ([2], True), "async": ([1, 2], True), "sync": ([1, 2], False)}
    for name, (parts, asynchronous) in ways.items():
        if machine.dry and name == "sync":
            continue
        run = machine.folder / f"resume {name}"
        for part in parts:
            overrides = (
                *(
                    f"train.run_dir={run}",
                    f"train.steps={part * half}",
                    "optim.schedule=constant",
                    "optim.warmup=0",
                ),
                *(f"checkpoint.asynchronous={str(asynchronous).lower()}", "train.eval_sequences=8"),
                *("train.sample_tokens=0", "train.deterministic=true", f"checkpoint.every={half}"),
                *("train.global_batch=8", "model.layers=2"),
            )
            fresh_accelerate()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    train(machine.config(*overrides), "", quiet=True)
            finally:
                torch.use_deterministic_algorithms(False)
        manifest = verify_checkpoint(list_steps(run / "checkpoints")[-1][1])
        found[name] = sorted(entry.sha256 for entry in manifest.files.values())
    whole = found.pop("whole")
    for name, files in found.items():
        same = files == whole
        yield f"{name}, last checkpoint as without", same, "True", same


def fp16(machine: Machine) -> Found:
    """The loss scale falls a few times at most, and the loss follows that of bf16."""
    config = machine.config("train.global_batch=8", "model.layers=2")
    losses = {}
    for precision in ("bf16", "fp16"):
        engine, losses[precision] = run_steps(
            replace(config, train=replace(config.train, precision=precision)), 30, "cuda"
        )
    scaler = engine.accelerator.scaler
    assert scaler is not None
    yield "loss scale", scaler.get_scale(), ">= 256", scaler.get_scale() >= 256
    yield limited(
        "last loss against bf16, relative", apart(losses["fp16"][-1:], losses["bf16"][-1:]), 0.05
    )


def two_ranks(machine: Machine) -> Found:
    """Two gloo ranks, on a GPU both on this one, against one process with two virtual ranks."""
    steps = machine.size(6, 2)
    for exchange in ("packed",) if machine.dry else ("packed", "padded"):
        config = machine.config(
            *(
                f"train.steps={steps}",
                "train.log_every=1",
                "train.eval_sequences=8",
                "train.sample_tokens=0",
            ),
            *("train.precision=fp32", "moe.capacity.factor=1.25", f"moe.exchange={exchange}"),
            *("train.global_batch=8", "model.layers=2", "parallel.backend=gloo"),
        )
        code, losses = torchrun(machine, 2, f"two {exchange}", config, [])
        virtual = replace(config, parallel=replace(config.parallel, virtual_ranks=2))
        expected = run_steps(virtual, steps, machine.device, scheduled=True)[1]
        yield f"{exchange}, exit code", code, "0", code == 0
        yield limited(f"{exchange}, losses, relative", apart(losses, expected), 1e-3)
