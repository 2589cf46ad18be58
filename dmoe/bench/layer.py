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

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.bench.breakdown import profile_kinds
from dmoe.bench.contender import Contender, clear
from dmoe.bench.libraries import LIBRARIES, build_all
from dmoe.bench.measure import (
    KernelCounter,
    interleave,
    machine,
    peak_bytes,
    quartiles,
    saved_bytes,
    summary,
)
from dmoe.config.schema import CapacityConfig, RouterConfig
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 0.02, "fp32": 1e-5}
"""bf16 rounds every product to 2^-9, and two blocks weigh the sum in another order."""

CONTEXT = TokenContext(noise_key=(0, 3))
"""Seed and step: one in which W7 bursts."""


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
    workload: RouterConfig | None = None,
    breakdown: bool = False,
    libraries: tuple[str, ...] | None = None,
    counts: bool = True,
) -> dict[str, Any]:
    """Compare the contenders, time them, and count what the layer costs.

    Args:
        shape: sizes.
        dtype: a key of `DTYPES`.
        device: `cpu` or `cuda`.
        rounds: rounds of the clock.
        capacity: capacity factor of `dmoe`; then it is compared with no other library.
        exchange: of `dmoe`.
        workload: router of kind `workload`, in place of the router of `dmoe`; then it is compared
            with the balanced workload, W0, and with no other library.
        breakdown: profile where the time of each row goes.
        libraries: keys of `LIBRARIES`; None: all that are installed.
        counts: measure peak memory, saved bytes and launches too.
    """
    shape = shape or Shape()
    found, left_out = contenders(shape, dtype, device, capacity, exchange, workload, libraries)
    differences = {}
    if (names := [name for name in found if name in LIBRARIES]) and capacity is None:
        mine = found["dmoe"].results()
        differences = {name: difference(mine, found[name].results(), dtype) for name in names}
    times = interleave({name: item.run for name, item in found.items()}, rounds, device)
    rows = summary(times, "gemms")
    for row in rows if counts else ():
        contender = found[row["name"]]
        row["peak_mb"] = peak_bytes(contender.run, device) / 1e6
        if contender.forward is not None:
            row["saved_per_token"] = saved_bytes(contender.forward) / shape.tokens
            with KernelCounter() as forward:
                contender.forward()
            with KernelCounter() as both:
                contender.run()
            row["launches"] = [forward.count, both.count - forward.count]
    load = {} if workload is None else {"workload": workload.workload, "hot": workload.hot}
    report: dict[str, Any] = {
        "machine": machine(device),
        "shape": asdict(shape)
        | {"dtype": dtype, "capacity": capacity, "exchange": exchange}
        | load,
        "rows": rows,
        "faster_than": {
            name: quartiles([b / a for a, b in zip(times["dmoe"], times[name], strict=True)])
            for name in times
            if name in LIBRARIES
        },
        "difference": differences,
        "left_out": left_out,
        "ms": times,
    }
    if breakdown:
        report["breakdown"] = {name: profile_kinds(item.run) for name, item in found.items()}
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
        output = layer(x, CONTEXT)
        # the losses of forced choices have no gradient
        losses = [loss for loss in output.aux.values() if loss.requires_grad]
        torch.autograd.backward([output.y, *losses], [grad, *map(torch.zeros_like, losses)])

    def results() -> dict[str, Tensor]:
        forward_backward()
        grads = {name: weight.grad for name, weight in layer.named_parameters()}
        found = {
            "y": layer(x, CONTEXT).y,
            "x": x.grad,
            "router": grads["router.weight"],
            "in": grads["experts.w_in"].transpose(1, 2),  # type: ignore[union-attr]
            "out": grads["experts.w_out"].transpose(1, 2),  # type: ignore[union-attr]
        }
        return {name: value for name, value in found.items() if value is not None}

    return Contender(forward_backward, results, lambda: layer(x, CONTEXT))


def contenders(
    shape: Shape,
    dtype_name: str,
    device: str,
    capacity: float | None = None,
    exchange: str = "packed",
    workload: RouterConfig | None = None,
    libraries: tuple[str, ...] | None = None,
) -> tuple[dict[str, Contender], str]:
    """Build the floor, dmoe and the installed libraries, by name; with a workload, W0 for them.

    Returns:
        The contenders, and a sentence that names the libraries left out, with the reason.
    """
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(1, shape.tokens, shape.dim, generator=generator).to(device, dtype)
        for _ in range(2)
    )
    options: dict[str, Any] = {
        "capacity": CapacityConfig(factor=capacity), "exchange": exchange
    }  # fmt: skip
    sizes = (shape.dim, shape.hidden, shape.experts, shape.top_k)
    routers = {"dmoe": workload or RouterConfig()}
    if workload is not None:
        routers["dmoe, W0"] = replace(workload, workload="W0")
    layers = {
        name: MoE(*sizes, router=router, **options).to(device, dtype)
        for name, router in routers.items()
    }
    found = {"gemms": floor(shape, dtype, device)}
    found |= {name: ours(layer, x, grad) for name, layer in layers.items()}
    if workload is not None:
        return found, "all libraries: they choose the experts by themselves"
    others, left_out = build_all(LIBRARIES, libraries, layers["dmoe"], x, grad)
    return found | others, left_out


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
