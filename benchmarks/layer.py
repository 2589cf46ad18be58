"""The layer's forward and backward, against what it cannot beat and what it must.

    python -m benchmarks.layer                      # T=4096 D=512 F=1024 E=16 K=2, bf16 and fp32
    python -m benchmarks.layer --experts 64 --top-k 8 --hidden 256 --dtype bf16 --profile

Rows of the table:
  gemms         the floor: the same multiplications as three large matrix products, forward and both backward products of each
  dmoe          `dmoe.MoE`, router, auxiliary losses and statistics included
  transformers  Mixtral's block with `experts_implementation="grouped_mm"`, the same weights and input; no losses, no statistics

Every round times each of them once, so that what else the machine does falls on all alike; ratios are taken within a round. Before
anything is timed, outputs and gradients of the two blocks are compared.

Letters: T tokens, D width, F expert hidden width, E experts, K experts a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.where import profile_layer
from dmoe import MoE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {
    "bf16": 0.02,
    "fp32": 1e-5,
}  # bf16 rounds every product to 2^-9, and the two blocks weigh the sum in another order


@dataclass(frozen=True)
class Shape:
    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Contender:
    run: Callable[[], None]
    results: Callable[[], dict[str, Tensor]] | None = None


def floor(shape: Shape, dtype: torch.dtype, device: str) -> Contender:
    """gate and up as one product, down as another: 3 products each, 18*N*D*F multiplications and additions in all."""
    rows = shape.tokens * shape.top_k
    pairs = []
    for inner, outer in ((shape.dim, 2 * shape.hidden), (shape.hidden, shape.dim)):
        x = torch.randn(rows, inner, dtype=dtype, device=device)
        weight = torch.randn(inner, outer, dtype=dtype, device=device)
        pairs.append((x, weight, torch.randn(rows, outer, dtype=dtype, device=device)))
    outputs = [(torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)) for x, w, g in pairs]

    def run() -> None:
        for (x, weight, grad), (out, grad_x, grad_weight) in zip(pairs, outputs, strict=True):
            torch.mm(x, weight, out=out)
            torch.mm(grad, weight.t(), out=grad_x)
            torch.mm(x.t(), grad, out=grad_weight)

    return Contender(run)


def ours(
    shape: Shape, dtype: torch.dtype, device: str, x: Tensor, grad: Tensor
) -> tuple[Contender, MoE]:
    layer = MoE(shape.dim, shape.hidden, shape.experts, shape.top_k).to(device, dtype)
    x = x.clone().requires_grad_()

    def run() -> None:
        clear(layer, x)
        output = layer(x)
        torch.autograd.backward(
            [output.y, *output.aux.values()], [grad, *map(torch.zeros_like, output.aux.values())]
        )

    def results() -> dict[str, Tensor]:
        run()
        w_in, w_out = (
            weight.grad.transpose(1, 2) for weight in (layer.experts.w_in, layer.experts.w_out)
        )
        return {
            "y": layer(x).y,
            "x": x.grad,
            "router": layer.router.weight.grad,
            "in": w_in,
            "out": w_out,
        }

    return Contender(run, results), layer


def theirs(
    shape: Shape, layer: MoE, dtype: torch.dtype, device: str, x: Tensor, grad: Tensor
) -> Contender:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        router_jitter_noise=0.0,
        experts_implementation="grouped_mm",
    )
    assert config._experts_implementation == "grouped_mm", (
        "this version of transformers would run another implementation"
    )
    block = MixtralSparseMoeBlock(config).to(device, dtype)
    with torch.no_grad():
        block.gate.weight.copy_(layer.router.weight)
        block.experts.gate_up_proj.copy_(layer.experts.w_in.transpose(1, 2))
        block.experts.down_proj.copy_(layer.experts.w_out.transpose(1, 2))
    x = x.clone().requires_grad_()

    def run() -> None:
        clear(block, x)
        block(x).backward(grad)

    def results() -> dict[str, Tensor]:
        run()
        experts = block.experts
        weights = {"in": experts.gate_up_proj.grad, "out": experts.down_proj.grad}
        return {"y": block(x), "x": x.grad, "router": block.gate.weight.grad, **weights}

    return Contender(run, results)


def clear(module: nn.Module, x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None


def contenders(shape: Shape, dtype_name: str, device: str) -> dict[str, Contender]:
    dtype = DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(1, shape.tokens, shape.dim, generator=generator).to(device, dtype)
        for _ in range(2)
    )
    mine, layer = ours(shape, dtype, device, x, grad)
    found = {"gemms": floor(shape, dtype, device), "dmoe": mine}
    try:
        found["transformers"] = theirs(shape, layer, dtype, device, x, grad)
    except ImportError:
        print("transformers is not installed: timed without it", file=sys.stderr)
    return found


def difference(one: dict[str, Tensor], two: dict[str, Tensor], dtype_name: str) -> dict[str, float]:
    """Relative difference by name; stops the run where it is too large.

    float32: the norm of the difference over the norm, of everything. bf16: the median token's, of output and input gradient alone:
    the peer's logits are bf16 there, so a few tokens choose another expert, which weight gradients cannot be cleared of.
    """
    names = one if dtype_name == "fp32" else ("y", "x")
    found = {}
    for name in names:
        rows, others = (value[name].detach().float().flatten(0, -2) for value in (one, two))
        error = (
            (rows - others).norm(dim=-1) / others.norm(dim=-1)
            if dtype_name == "bf16"
            else (rows - others).norm() / others.norm()
        )
        found[name] = float(error.median())
    if not all(error < TOLERANCE[dtype_name] for error in found.values()):
        raise SystemExit(
            f"the two blocks do not compute the same thing: relative difference {found}"
        )
    return found


def measure(found: dict[str, Contender], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each contender in each round, in an order that turns."""
    times: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for turn in range(-2, rounds):  # two rounds to warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            found[name].run()
            synchronize(device)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summary(times: dict[str, list[float]]) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for name, values in times.items():
        ratios = [value / bare for value, bare in zip(values, times["gemms"], strict=True)]
        low, middle, high = quartiles(values)
        ratio_low, ratio, ratio_high = quartiles(ratios)
        rows.append(
            {
                "name": name,
                "ms": middle,
                "ms_q1": low,
                "ms_q3": high,
                "ratio": ratio,
                "ratio_q1": ratio_low,
                "ratio_q3": ratio_high,
            }
        )
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return low, middle, high


def show(
    dtype_name: str, rows: list[dict[str, float | str]], times: dict[str, list[float]]
) -> None:
    print(f"\n{dtype_name:14}{'median ms':>10}{'quartiles':>18}{'x gemms':>9}{'quartiles':>14}")
    for row in rows:
        spread, ratio_spread = (
            f"{row['ms_q1']:.1f} .. {row['ms_q3']:.1f}",
            f"{row['ratio_q1']:.2f} .. {row['ratio_q3']:.2f}",
        )
        print(f"{row['name']:14}{row['ms']:10.1f}{spread:>18}{row['ratio']:9.2f}{ratio_spread:>14}")
    if "transformers" in times:
        low, middle, high = quartiles(
            [a / b for a, b in zip(times["dmoe"], times["transformers"], strict=True)]
        )
        print(f"dmoe / transformers, by round: {middle:.2f} ({low:.2f} .. {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 4096),
        ("dim", 512),
        ("hidden", 1024),
        ("experts", 16),
        ("top-k", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=[*DTYPES, "both"], default="both")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--json", action="store_true", help="the numbers as JSON on stdout, nothing else there"
    )
    parser.add_argument("--profile", action="store_true", help="where the layer's time goes")
    args = parser.parse_args()
    shape = Shape(args.tokens, args.dim, args.hidden, args.experts, args.top_k)
    report: dict[str, object] = {
        "shape": vars(shape),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for dtype_name in DTYPES if args.dtype == "both" else [args.dtype]:
        found = contenders(shape, dtype_name, args.device)
        comparable = [contender.results() for contender in found.values() if contender.results]
        differences = difference(*comparable, dtype_name) if len(comparable) == 2 else {}
        times = measure(found, args.rounds, args.device)
        rows = summary(times)
        report[dtype_name] = {"rows": rows, "difference": differences, "ms": times}
        if not args.json:
            show(dtype_name, rows, times)
        if args.profile:
            report[f"{dtype_name} profile"] = parts = profile_layer(found["dmoe"].run)
            if not args.json:
                print("".join(f"  {name:14}{share:7.1%}\n" for name, share in parts.items()))
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
