"""The layer's forward and backward, against what it cannot beat and what it must.

Rows of the table:
  gemms         the floor: the same multiplications as three large matrix products, forward and both
                backward products of each
  dmoe          `dmoe.MoE`, router, auxiliary losses and statistics included
  others        the installed libraries (`libraries.py`), the same weights and input

Before anything is timed, outputs and gradients are compared.

Letters: T tokens, D width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe.bench.breakdown import profile_layer
from dmoe.bench.libraries import LIBRARIES, Contender, clear
from dmoe.bench.measure import (
    KernelCounter,
    interleave,
    machine,
    peak_bytes,
    quartiles,
    saved_bytes,
    summary,
)
from dmoe.config.schema import CapacityConfig
from dmoe.moe.layer import MoE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 0.02, "fp32": 1e-5}
"""bf16 rounds every product to 2^-9, and two blocks weigh the sum in another order."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer and its batch."""

    tokens: int = 4096
    dim: int = 512
    hidden: int = 1024
    experts: int = 16
    top_k: int = 2


def run(
    shape: Shape | None = None,
    *,
    dtype: str = "bf16",
    device: str = "cpu",
    rounds: int = 21,
    capacity: float | None = None,
    exchange: str = "packed",
    breakdown: bool = False,
) -> dict[str, Any]:
    """Compare the contenders, time them, and count what the layer costs.

    Args:
        shape: sizes.
        dtype: a key of `DTYPES`.
        device: `cpu` or `cuda`.
        rounds: rounds of the clock.
        capacity: capacity factor of `dmoe`; then it is compared with no other library.
        exchange: of `dmoe`.
        breakdown: profile where the time of `dmoe` goes.
    """
    shape = shape or Shape()
    found = contenders(shape, dtype, device, capacity, exchange)
    differences = {}
    if capacity is None:
        for name in found.keys() & LIBRARIES.keys():
            differences[name] = difference(found["dmoe"].results(), found[name].results(), dtype)
    times = interleave({name: item.run for name, item in found.items()}, rounds, device)
    rows = summary(times, "gemms")
    for row in rows:
        contender = found[row["name"]]
        row["peak_mb"] = peak_bytes(contender.run, device) / 1e6
        if contender.forward is not None:
            row["saved_per_token"] = saved_bytes(contender.forward) / shape.tokens
            with KernelCounter() as forward:
                contender.forward()
            with KernelCounter() as both:
                contender.run()
            row["launches"] = [forward.count, both.count - forward.count]
    report: dict[str, Any] = {
        "machine": machine(device),
        "shape": asdict(shape) | {"dtype": dtype, "capacity": capacity, "exchange": exchange},
        "rows": rows,
        "faster_than": {
            name: quartiles([b / a for a, b in zip(times["dmoe"], times[name], strict=True)])
            for name in times
            if name in LIBRARIES
        },
        "difference": differences,
        "ms": times,
    }
    if breakdown:
        report["breakdown"] = profile_layer(found["dmoe"].run)
    return report


def floor(shape: Shape, dtype: torch.dtype, device: str) -> Contender:
    """Compute gate and up as one product, down as another: three products each.

    18*N*D*F multiplications and additions in all, for N = T*K rows.
    """
    rows = shape.tokens * shape.top_k
    pairs = []
    for inner, outer in ((shape.dim, 2 * shape.hidden), (shape.hidden, shape.dim)):
        x = torch.randn(rows, inner, dtype=dtype, device=device)
        weight = torch.randn(inner, outer, dtype=dtype, device=device)
        pairs.append((x, weight, torch.randn(rows, outer, dtype=dtype, device=device)))
    outputs = [(torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)) for x, w, g in pairs]

    def products() -> None:
        for (x, weight, grad), (out, grad_x, grad_weight) in zip(pairs, outputs, strict=True):
            torch.mm(x, weight, out=out)
            torch.mm(grad, weight.t(), out=grad_x)
            torch.mm(x.t(), grad, out=grad_weight)

    return Contender(products)


def ours(layer: MoE, x: Tensor, grad: Tensor) -> Contender:
    """Run `dmoe.MoE` with all its losses and statistics."""
    x = x.detach().clone().requires_grad_()

    def forward_backward() -> None:
        clear(layer, x)
        output = layer(x)
        torch.autograd.backward(
            [output.y, *output.aux.values()], [grad, *map(torch.zeros_like, output.aux.values())]
        )

    def results() -> dict[str, Tensor]:
        forward_backward()
        grads = {name: weight.grad for name, weight in layer.named_parameters()}
        found = {
            "y": layer(x).y,
            "x": x.grad,
            "router": grads["router.weight"],
            "in": grads["experts.w_in"].transpose(1, 2),  # type: ignore[union-attr]
            "out": grads["experts.w_out"].transpose(1, 2),  # type: ignore[union-attr]
        }
        return {name: value for name, value in found.items() if value is not None}

    return Contender(forward_backward, results, lambda: layer(x))


def contenders(
    shape: Shape,
    dtype_name: str,
    device: str,
    capacity: float | None = None,
    exchange: str = "packed",
) -> dict[str, Contender]:
    """Build the floor, dmoe and the installed libraries, by name."""
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(1, shape.tokens, shape.dim, generator=generator).to(device, dtype)
        for _ in range(2)
    )
    layer = MoE(
        shape.dim,
        shape.hidden,
        shape.experts,
        shape.top_k,
        capacity=CapacityConfig(factor=capacity),
        exchange=exchange,
    ).to(device, dtype)
    found = {"gemms": floor(shape, dtype, device), "dmoe": ours(layer, x, grad)}
    for name, build in LIBRARIES.items():
        try:
            found[name] = build(layer, x, grad)
        except ImportError:
            print(f"{name} is not installed: timed without it", file=sys.stderr)
    return found


def difference(one: dict[str, Tensor], two: dict[str, Tensor], dtype: str) -> dict[str, float]:
    """Return relative differences by name; end the run where one is too large.

    float32: the norm of the difference over the norm, of everything. bf16: the median token's, of
    output and input gradient alone: their logits are bf16, so a few tokens choose another
    expert, which weight gradients cannot be cleared of.
    """
    names = one if dtype == "fp32" else ("y", "x")
    found = {}
    for name in names:
        rows, others = (value[name].detach().float().flatten(0, -2) for value in (one, two))
        error = (
            (rows - others).norm(dim=-1) / others.norm(dim=-1)
            if dtype == "bf16"
            else (rows - others).norm() / others.norm()
        )
        found[name] = float(error.median())
    if not all(error < TOLERANCE[dtype] for error in found.values()):
        raise SystemExit(f"two layers do not compute the same: relative difference {found}")
    return found
