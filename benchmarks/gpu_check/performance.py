"""Host reads, memory, copies, speed and launches."""

from __future__ import annotations

import time
import warnings

import torch

from benchmarks.gpu_check.checks import QUICKSTART, Found, Machine, limited
from benchmarks.gpu_check.layers import LAYERS
from benchmarks.gpu_check.runs import engine_of
from dmoe import MoE
from dmoe.checkpoint.async_saver import Staging
from dmoe.train.step import train_step, training_batches

MULTI_GPU = QUICKSTART.parent / "multi_gpu.yaml"


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


def speed(machine: Machine) -> Found:
    """A layer against bare matrix products and transformers' block on the same card."""
    from dmoe.bench.layer import Shape, contenders
    from dmoe.bench.measure import interleave, quartiles

    shapes = {"coarse": Shape(8192, 4096, 14336, 8, 2), "fine": Shape(8192, 2048, 768, 128, 8)}
    for name, shape in {"tiny": Shape(64, 64, 64, 4, 2)}.items() if machine.dry else shapes.items():
        dtype = "fp32" if machine.dry else "bf16"
        found, _ = contenders(shape, dtype, machine.device, libraries=("transformers",))
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


def trace(machine: Machine) -> Found:
    """Launches and the GPU's busy share in a step of configs/multi_gpu.yaml with two layers."""
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
