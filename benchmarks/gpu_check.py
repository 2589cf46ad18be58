"""What one GPU can show of dmoe: a line per check, and all of them as one JSON.

    benchmarks/gpu_check.sh first           # correctness: start, layers, grouped GEMM, determinism, host syncs
    benchmarks/gpu_check.sh second          # runs: verify, resuming, fp16, two ranks, memory, speed
    benchmarks/gpu_check.sh all --dry-run   # what a CPU can run of both, smaller

A half takes less than four minutes: after `DEADLINE` the rest is not started, and its lines say so. Exit code 0: nothing failed.
Works from a checkout without an installation, with torch 2.11, and with omegaconf, wandb and plotly from a folder in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Before CUDA starts: `train.deterministic` asks for it too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from dmoe import MoE
from dmoe.checkpoint import list_steps
from dmoe.checkpoint import verify as verify_checkpoint
from dmoe.checkpoint.async_saver import Staging
from dmoe.config.load import load, to_yaml
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import CapacityConfig, Config, ExpertsConfig, RouterConfig
from dmoe.data import open_data
from dmoe.distributed.init import ProcessInfo, init_distributed, set_cuda_environment
from dmoe.models.layers import RMSNorm
from dmoe.moe.experts.grouped_mlp import grouped_linear
from dmoe.moe.routing import TokenContext
from dmoe.train.engine import Engine, build_engine
from dmoe.train.run import train
from dmoe.train.step import train_step, training_batches
from dmoe.verify.capture import noise_from_cpu

DEADLINE = 225.0
"""Seconds of a half after which no check is started."""

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
MULTI_GPU = QUICKSTART.parent / "multi_gpu.yaml"


@dataclass(frozen=True)
class Row:
    """One line: `ok` is None where nothing was checked, or nothing can be wrong."""

    check: str
    name: str
    got: str
    wanted: str
    ok: bool | None


@dataclass(frozen=True)
class Machine:
    device: str
    dry: bool
    folder: Path

    def size(self, full: int, dry: int) -> int:
        return dry if self.dry else full

    def config(self, *overrides: str, path: Path = QUICKSTART) -> Config:
        given = [f"train.device={self.device}", "data.source=synthetic:zipf"]
        small = ["model.dim=64", "model.layers=2", "moe.expert_dim=32", "data.seq_len=32"]
        return load(path, [*given, *(small if self.dry else []), *overrides])


Found = Iterator[tuple[str, object, str, bool | None]]
"""Name, got, wanted, ok."""
Check = Callable[[Machine], Found]
CHECKS: dict[str, tuple[str, bool, Check]] = {}
"""Half, whether the check needs a GPU, and the check, by name, in order."""


def check(half: str, *, needs_gpu: bool = False) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[function.__name__] = (half, needs_gpu, function)
        return function

    return add


def limited(name: str, got: float, limit: float) -> tuple[str, object, str, bool | None]:
    return name, f"{got:.2g}", f"<= {limit:g}", bool(got <= limit)


@check("first")
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


@check("first")
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


@check("first")
def same_losses(machine: Machine) -> Found:
    """fp32 on both devices, without a launcher: rounding only, which grows with the steps."""
    config = machine.config(
        "train.precision=fp32", "model.layers=2", "model.dim=64", "train.global_batch=8"
    )
    steps = machine.size(20, 6)
    own, cpu = (run_steps(config, steps, device)[1] for device in (machine.device, "cpu"))
    yield limited("5 steps, relative", apart(own[:5], cpu[:5]), 1e-5)
    yield limited(f"step {steps}, relative", apart(own[-1:], cpu[-1:]), 1e-3)


LAYERS: dict[str, dict[str, Any]] = {
    "packed": {},
    "capacity": {"capacity": CapacityConfig(factor=0.75)},
    "padded": {"capacity": CapacityConfig(factor=0.75), "exchange": "padded"},
    "by score": {"capacity": CapacityConfig(factor=0.75, priority="score")},
    "sigmoid": {"router": RouterConfig(score="sigmoid")},
    "noisy": {"router": RouterConfig(kind="noisy")},
    "expert_choice": {"router": RouterConfig(kind="expert_choice")},
    "adaptive": {"router": RouterConfig(kind="adaptive", top_p=0.4, renormalize=False)},
    "budget": {"router": RouterConfig(kind="budget", budget=0.4, renormalize=False)},
    "soft": {"router": RouterConfig(kind="soft"), "top_k": 8},
    "shared gelu": {"experts": ExpertsConfig(shared=1, kind="gelu")},
    "zero-cost": {
        "router": RouterConfig(renormalize=False),
        "experts": ExpertsConfig(zero=1, copy=1, constant=1),
    },
    "mixed": {"experts": ExpertsConfig(shapes=[[64], [12], [20, 36], [], [64], [8], [100], [30]])},
    "width 100": {"dim": 100, "expert_dim": 100},
    "width 30": {"dim": 30, "expert_dim": 20},
    "out 10": {"out_dim": 10},
}
PRECISIONS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@check("first")
def layers(machine: Machine) -> Found:
    """Every kind of layer on the device, against float64 on the CPU from the same numbers."""
    for name, options in LAYERS.items():
        for dtype, limit in PRECISIONS.items():
            if machine.dry and dtype != torch.float32:
                continue
            different, error = layer_differences(dict(options), dtype, machine)
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            # In half precision scores of two experts may be equal: undecided, and so left out.
            allowed = 0.0 if dtype == torch.float32 else 0.02
            yield limited(f"{label}, share of tokens with other experts", different, allowed)
            if different == 0.0:
                yield limited(f"{label}, outputs and gradients", error, limit)


def layer_differences(
    options: dict[str, Any], dtype: torch.dtype, machine: Machine
) -> tuple[float, float]:
    """Share of tokens with other experts, and the largest relative error of y and all gradients."""
    sizes = {"dim": 64, "expert_dim": 64, "num_experts": 8, "top_k": 2} | options
    positional = [sizes.pop(key) for key in ("dim", "expert_dim", "num_experts", "top_k")]
    torch.manual_seed(0)
    x = torch.randn(4, machine.size(512, 32), positional[0]).to(dtype)
    results = []
    for device, kind in ((machine.device, dtype), ("cpu", torch.float64)):
        layer = MoE(*positional, **sizes)
        layer.initialize(0, std=0.1, out_std=0.1)
        layer = layer.to(dtype).to(device, kind)
        own = x.detach().to(device, kind).clone().requires_grad_()
        with noise_from_cpu():
            output = layer(own, TokenContext(noise_key=(0, 0)))
        grad = torch.randn(output.y.shape, generator=torch.Generator().manual_seed(1))
        loss = (output.y * grad.to(output.y)).sum() + sum(output.aux.values())
        loss.backward()
        assigned = torch.zeros(
            len(output.plan.expert_TK), output.plan.num_experts, dtype=torch.bool
        )
        kept_TK = output.plan.is_kept_TK.cpu()
        rows, columns = kept_TK.nonzero(as_tuple=True)
        assigned[rows, output.plan.expert_TK.cpu()[rows, columns]] = True
        values = {"y": output.y, "x": own.grad} | {n: p.grad for n, p in layer.named_parameters()}
        results.append(
            (assigned, {n: v.detach().double().cpu() for n, v in values.items() if v is not None})
        )
    (own_TE, own_values), (cpu_TE, cpu_values) = results
    different = float((own_TE != cpu_TE).any(1).double().mean())
    return different, max(relative(own_values[name], cpu_values[name]) for name in cpu_values)


def relative(value: Tensor, expected: Tensor) -> float:
    if not torch.isfinite(value).all():
        return math.inf
    return float(((value - expected).norm() / expected.norm().clamp(min=1e-30)).detach())


GROUPS = {
    "first, middle and last empty": [0, 300, 0, 0, 211, 0],
    "all rows in one": [0, 0, 777, 0],
    "no rows": [0, 0, 0],
    "one row": [0, 1],
    "one expert": [513],
    "128 experts": [7 * (n % 5) for n in range(128)],
    "1,000 experts": [n % 3 for n in range(1000)],
}


@check("first")
def grouped_gemm(machine: Machine) -> Found:
    """Experts without rows between poisoned blocks: a gradient of zero, and no number of others."""
    cases = GROUPS if machine.dry else GROUPS | {"131,072 rows": [131072 // 8] * 8}
    dtypes = [torch.float32] if machine.dry else list(PRECISIONS)
    for name, counts in cases.items():
        for dtype in dtypes:
            poison = [
                torch.full((1 << 22,), math.nan, device=machine.device)
                for _ in range(machine.size(16, 1))
            ]
            del poison
            torch.manual_seed(0)
            total, width, out = sum(counts), 64, 96
            rows = torch.randn(total, width).to(dtype)
            weight = torch.randn(len(counts), width, out).to(dtype)
            own_rows, own_weight = (
                part.to(machine.device).requires_grad_() for part in (rows, weight)
            )
            count = torch.tensor(counts, device=machine.device)
            result = grouped_linear(own_rows, own_weight, count)
            result.backward(torch.ones_like(result))
            assert own_rows.grad is not None
            assert own_weight.grad is not None
            pieces = zip(rows.double().split(counts), weight.double(), strict=True)
            expected = (
                torch.cat([part @ matrix for part, matrix in pieces])
                if total
                else rows.double().new_zeros(0, out)
            )
            grads = torch.stack(
                [part.sum(0)[:, None].expand(width, out) for part in rows.double().split(counts)]
            )
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            empty = own_weight.grad[count == 0]
            yield (
                f"{label}, gradients of empty experts",
                int((empty != 0).sum()),
                "0",
                not bool((empty != 0).any()),
            )
            if total:
                error = max(
                    relative(result.detach().double().cpu(), expected),
                    relative(own_weight.grad.double().cpu(), grads),
                )
                yield limited(f"{label}, error", error, PRECISIONS[dtype])


@check("first")
def determinism(machine: Machine) -> Found:
    """Three steps twice. Without the switch the backward of attention on a GPU adds in any order."""
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


@check("first", needs_gpu=True)
def host_syncs(machine: Machine) -> Found:
    """A layer on one GPU reads nothing on the host; a step reads its totals."""
    for name in ("packed", "padded"):
        layer = MoE(256, 256, 16, 2, **LAYERS[name]).to("cuda", torch.bfloat16)
        x = torch.randn(4, 256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        problem = "none"
        for mode in ("default", "error"):  # the first one loads kernels
            torch.cuda.set_sync_debug_mode(mode)
            try:
                output = layer(x)
                (output.y.sum() + sum(output.aux.values())).backward()
            except RuntimeError as error:
                problem = str(error).splitlines()[0][:80]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        yield f"{name} layer", problem, "none", problem == "none"
    engine = engine_of(machine.config("train.global_batch=8"), "cuda")
    batches = training_batches(engine.task.open_data().train, engine, 0)
    train_step(engine, batches, 1e-3)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_step(engine, batches, 1e-3)
    torch.cuda.set_sync_debug_mode("default")
    yield "a step", len(caught), "1, and the copies from the host", None


@check("first")
def qk_norm(machine: Machine) -> Found:
    """A gain of 1 + 2^-9 must change a norm in bf16, whose steps near 1 are 2^-7."""
    norm = RMSNorm(256, 1e-6).to(machine.device)
    x = torch.randn(64, 256, device=machine.device, dtype=torch.bfloat16)
    with torch.autocast(machine.device, torch.bfloat16), torch.no_grad():
        before = norm(x)
        norm.weight.fill_(1 + 2**-9)
        after = norm(x)
    yield "dtype", before.dtype, "torch.bfloat16", before.dtype == torch.bfloat16
    changed = float((before != after).double().mean())
    yield "share of numbers that change", f"{changed:.3f}", "> 0.1", changed > 0.1


@check("second")
def verify(machine: Machine) -> Found:
    """`dmoe verify --device`: one GPU against the naive layers on the CPU, in both precisions."""
    from dmoe.verify.verify import verify as verify_config

    for dtype in ("float32",) if machine.dry else ("float64", "float32"):
        config = load(None, ["moe.capacity.factor=1.25", "model.layers=2"])
        report = verify_config(config, [1], dtype=dtype, device=machine.device)
        first = report.first
        got = "equal" if first is None else f"{first.quantity} in {first.case}: {first.where}"
        yield f"{dtype}, {len(report.cases)} cases", got, "equal", report.ok


@check("second")
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


@check("second")
def staging(machine: Machine) -> Found:
    """The pinned copy of a state for a save in the background."""
    state = {
        f"w{n}": torch.randn(machine.size(1 << 24, 1 << 12) + n, device=machine.device)
        for n in range(4)
    }
    copier = Staging()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        copied = copier.copy(state)
        seconds.append(time.perf_counter() - start)
    wrong = sum(not torch.equal(copied[name], value.cpu()) for name, value in state.items())
    yield "tensors that differ", wrong, "0", wrong == 0
    if machine.device == "cuda":
        pinned = copied["w0"].is_pinned()
        yield "pinned", pinned, "True", pinned
        yield (
            "GB/s, third copy",
            f"{sum(v.nbytes for v in state.values()) / seconds[2] / 1e9:.1f}",
            "> 10",
            None,
        )
    copier.clear()


@check("second", needs_gpu=True)
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


@check("second")
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


@check("second", needs_gpu=True)
def memory(machine: Machine) -> Found:
    """Bytes per parameter, and no growth after the first steps."""
    config = machine.config(
        "model.dim=1024", "model.heads=16", "train.global_batch=4", "train.precision=bf16"
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = engine_of(config, "cuda")
    peaks = {"warm-up": torch.cuda.max_memory_allocated() - before}
    data = engine.task.open_data().train
    for step in range(50):
        train_step(engine, training_batches(data, engine, step), 1e-3)
        if step in (0, 4, 49):
            peaks[f"step {step + 1}"] = torch.cuda.max_memory_allocated() - before
    parameters = sum(p.numel() for p in engine.model.parameters())
    yield "peaks in MiB", {name: peak >> 20 for name, peak in peaks.items()}, "", None
    yield limited("growth from step 5 to 50", peaks["step 50"] / peaks["step 5"] - 1, 0.02)
    at_rest = (torch.cuda.memory_allocated() - before) / parameters
    yield (
        "bytes per parameter between steps",
        f"{at_rest:.1f}",
        "12 (weights and moments)",
        11 < at_rest < 14,
    )


@check("second")
def speed(machine: Machine) -> Found:
    """A layer against bare matrix products and transformers' block on the same card."""
    from dmoe.bench.layer import Shape, contenders
    from dmoe.bench.measure import interleave, quartiles

    shapes = {"coarse": Shape(8192, 4096, 14336, 8, 2), "fine": Shape(8192, 2048, 768, 128, 8)}
    for name, shape in {"tiny": Shape(64, 64, 64, 4, 2)}.items() if machine.dry else shapes.items():
        found = contenders(shape, "fp32" if machine.dry else "bf16", machine.device)
        times = interleave(
            {name: contender.run for name, contender in found.items()},
            machine.size(3, 1),
            machine.device,
        )
        yield (
            f"{name}, ms",
            {key: round(quartiles(values)[1], 2) for key, values in times.items()},
            "",
            None,
        )
        if "transformers" in times:
            ratio = quartiles(
                [a / b for a, b in zip(times["dmoe"], times["transformers"], strict=True)]
            )[1]
            yield (
                f"{name}, dmoe / transformers",
                f"{ratio:.2f}",
                "< 1",
                None if machine.dry else ratio < 1,
            )
        if machine.device == "cuda":
            torch.cuda.empty_cache()


@check("second", needs_gpu=True)
def trace(machine: Machine) -> Found:
    """Launches and the busy share of the GPU in a step of configs/multi_gpu.yaml with two layers."""
    overrides = ("parallel.ep=1", "parallel.backend=auto", "model.layers=2", "train.global_batch=8")
    engine = engine_of(machine.config(*overrides, path=MULTI_GPU), "cuda")
    batches = training_batches(engine.task.open_data().train, engine, 0)
    for _ in range(3):
        train_step(engine, batches, 1e-3)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        train_step(engine, batches, 1e-3)
        torch.cuda.synchronize()
    wall = time.perf_counter() - start
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.device_time for event in kernels) / 1e6
    yield "kernels of a step", len(kernels), "about 1,200", None
    yield "busy share under the profiler", f"{busy / wall:.2f}", "", None
    by_name: dict[str, float] = {}
    for event in kernels:
        by_name[event.name[:60]] = by_name.get(event.name[:60], 0.0) + event.device_time
    for name, micros in sorted(by_name.items(), key=lambda item: -item[1])[:20]:
        yield f"kernel {name}", f"{micros / 1e3:.2f} ms", "", None


def fresh_accelerate() -> None:
    """One process builds many engines; accelerate expects one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def engine_of(config: Config, device: str) -> Engine:
    fresh_accelerate()
    config = replace(config, train=replace(config.train, device=device))
    process: ProcessInfo = init_distributed(device)
    data = load_data(config)
    return build_engine(config, process, data.tokenizer.vocab_size)


def load_data(config: Config) -> Any:
    return open_data(config.data, config.train.seed)


def run_steps(
    config: Config, steps: int, device: str = "cpu", scheduled: bool = False
) -> tuple[Engine, list[float]]:
    """Train without a launcher and without a run directory; mean losses in nats."""
    engine = engine_of(config, device)
    data = engine.task.open_data().train
    losses = []
    for step in range(steps):
        rate = learning_rate(step, config.train.steps, config.optim) if scheduled else 1e-3
        result = train_step(engine, training_batches(data, engine, step), rate)
        losses.append(result.totals.loss)
    return engine, losses


def torchrun(
    machine: Machine, ranks: int, name: str, config: Config, more: list[str]
) -> tuple[int, list[float]]:
    """Train under torchrun; its exit code and the training losses."""
    path, run = machine.folder / f"{name}.yaml", machine.folder / name
    path.write_text(to_yaml(config), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    command += ["-m", "dmoe", "train", "--quiet", str(path), f"train.run_dir={run}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if machine.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(
            ","
        )[0]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return done.returncode, [math.nan]
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return 0, [record["loss"] for record in records if record["event"] == "train"]


def apart(values: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite where there are not as many values."""
    if len(values) != len(expected) or not all(map(math.isfinite, values)):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def run_checks(machine: Machine, names: list[str], deadline: float) -> Iterator[Row]:
    """Yield the rows of the checks; one that raises is a row that failed."""
    for name in names:
        _, needs_gpu, function = CHECKS[name]
        if needs_gpu and machine.device != "cuda":
            yield Row(name, "", "not run", "a GPU", None)
            continue
        if time.monotonic() > deadline:
            yield Row(name, "", "not run: out of time", "", None)
            continue
        start = time.monotonic()
        try:
            for label, got, wanted, ok in function(machine):
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("half", choices=["first", "second", "all"], nargs="?", default="all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, smaller")
    parser.add_argument("--only", help="one check by name")
    parser.add_argument("--json", default="gpu_check.json", help="file for all rows")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_check: no GPU is visible; --dry-run runs what a CPU can")
    set_cuda_environment()
    if args.dry_run:
        torch.set_num_threads(1)
    names = [
        n
        for n, (half, _, _) in CHECKS.items()
        if args.half in (half, "all") and args.only in (n, None)
    ]
    rows, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine("cpu" if args.dry_run else "cuda", args.dry_run, Path(folder))
        halves = 2 if args.half == "all" else 1
        for row in run_checks(machine, names, start + halves * DEADLINE):
            rows.append(row)
            mark = {True: "ok", False: "FAILED", None: "-"}[row.ok]
            print(
                f"{mark:7}{row.check + ': ' + row.name:70} {row.got:>24}   {row.wanted}", flush=True
            )
    failed = [row for row in rows if row.ok is False]
    report = {
        "half": args.half,
        "dry_run": args.dry_run,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    report |= {
        "seconds": round(time.monotonic() - start, 1),
        "failed": len(failed),
        "rows": [asdict(row) for row in rows],
    }
    Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(failed)} of {sum(row.ok is not None for row in rows)} checks failed; all of them in {args.json}"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
