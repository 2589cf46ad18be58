"""Layers and their products on the GPU, against the CPU from the same numbers."""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.gpu_check.checks import Found, Machine, limited, relative
from dmoe import MoE
from dmoe.config.schema import CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.models.layers import RMSNorm
from dmoe.moe.experts.grouped_product import grouped_linear
from dmoe.moe.routing import TokenContext
from dmoe.verify.capture import noise_from_cpu

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


def triton_kernels(machine: Machine) -> Found:
    """`moe.kernels=triton` on the device, against float64 by torch on the CPU."""
    for name in ("packed", "capacity", "padded", "shared gelu"):
        for dtype, limit in PRECISIONS.items():
            different, error = layer_differences(
                LAYERS[name] | {"kernels": "triton"}, dtype, machine
            )
            label = f"{name} {str(dtype).removeprefix('torch.')}"
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


GROUPS = {
    "first, middle and last empty": [0, 300, 0, 0, 211, 0],
    "all rows in one": [0, 0, 777, 0],
    "no rows": [0, 0, 0],
    "one row": [0, 1],
    "one expert": [513],
    "128 experts": [7 * (n % 5) for n in range(128)],
    "1,000 experts": [n % 3 for n in range(1000)],
}


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
