"""Small float64 layers with large weights, and their gradients by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe import MoE
from dmoe.moe.layer import MoEOutput
from dmoe.moe.routing import TokenContext

DIM = 6


def make(*, seed: int = 0, experts_per_token: int = 2, num_experts: int = 5, **options: Any) -> MoE:
    layer = MoE(DIM, 4, num_experts, experts_per_token, **options).double()
    layer.initialize(seed, std=0.6, out_std=0.8)
    return layer


def tokens_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def objective(output: MoEOutput) -> Tensor:
    """A scalar through which everything the layer returns sends gradient, by unequal amounts.

    Linear in y, so that a rounded y does not change the gradient that is sent back.
    """
    direction = torch.arange(1.0, output.y.numel() + 1, dtype=torch.float64).mul(0.7).sin()
    total: Tensor = (output.y.flatten() * direction).sum()
    for position, name in enumerate(sorted(output.aux)):
        total = total + (0.3 + position) * output.aux[name]
    return total


def gradients(
    layer: MoE, x: Tensor, context: TokenContext | None = None
) -> tuple[MoEOutput, dict[str, Tensor]]:
    """A forward and backward; gradients of every parameter and of `x`."""
    layer.zero_grad()
    x.grad = None
    output = layer(x, context or TokenContext())
    objective(output).backward()
    found = {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), [
        name for name, g in found.items() if g is None
    ]
    return output, {
        name: gradient.clone() for name, gradient in found.items() if gradient is not None
    }


def close(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
