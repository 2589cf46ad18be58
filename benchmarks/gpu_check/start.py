"""Versions, a start under torchrun, and the same losses and bits as elsewhere."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import replace

import torch

from benchmarks.gpu_check.checks import Found, Machine, apart, limited
from benchmarks.gpu_check.runs import run_steps, torchrun
from dmoe.train.engine import Engine


def versions(machine: Machine) -> Found:
    """Decides which of the others are known to fail."""
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        yield "nvidia-smi", said.stdout.strip().replace("\n", "; "), "a GPU", None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield "torch", torch.__version__, ">= 2.11", version >= (2, 11)
    yield "CUDA of torch", torch.version.cuda, "", None
    if machine.device == "cuda":
        capability = torch.cuda.get_device_capability()
        yield "capability", capability, "9.0 or 10.x for grouped_mm's own kernels", None
        yield "NCCL", torch.cuda.nccl.version(), ">= 2.26: NCCL_LAUNCH_ORDER_IMPLICIT", None


def launched(machine: Machine) -> Found:
    """One rank under torchrun: NCCL with world 1, which once ended in an assertion."""
    steps = machine.size(20, 2)
    overrides = [
        f"train.steps={steps}",
        "train.log_every=1",
        "train.eval_sequences=8",
        "train.sample_tokens=0",
    ]
    config = machine.config(*overrides)
    code, losses = torchrun(machine, 1, "launched", config, [])
    yield "exit code", code, "0", code == 0
    first = run_steps(
        replace(config, train=replace(config.train, device="cpu", precision="fp32")), 1
    )[1][0]
    yield limited("first loss against the CPU, relative", apart(losses[:1], [first]), 1e-3)
    yield "last loss", f"{losses[-1]:.4f}", f"< {first:.4f}", losses[-1] < first


def same_losses(machine: Machine) -> Found:
    """fp32 on both devices, without a launcher: rounding only, which grows with the steps."""
    config = machine.config(
        "train.precision=fp32", "model.layers=2", "model.dim=64", "train.global_batch=8"
    )
    steps = machine.size(20, 6)
    own, cpu = (run_steps(config, steps, device)[1] for device in (machine.device, "cpu"))
    yield limited("5 steps, relative", apart(own[:5], cpu[:5]), 1e-5)
    yield limited(f"step {steps}, relative", apart(own[-1:], cpu[-1:]), 1e-3)


def determinism(machine: Machine) -> Found:
    """Three steps twice. Without the switch attention's backward on a GPU adds in any order."""
    config = machine.config("train.global_batch=8", "model.layers=2")
    hashes = [weights_hash(run_steps(config, 3, machine.device)[0]) for _ in range(2)]
    yield "two runs, train.deterministic=false", hashes[0] == hashes[1], "True or False", None
    torch.use_deterministic_algorithms(True)
    try:
        hashes = [weights_hash(run_steps(config, 3, machine.device)[0]) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    yield (
        "two runs, train.deterministic=true",
        hashes[0] == hashes[1],
        "True",
        hashes[0] == hashes[1],
    )


def weights_hash(engine: Engine) -> str:
    digest = hashlib.sha256()
    for parameter in engine.model.parameters():
        digest.update(parameter.detach().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
