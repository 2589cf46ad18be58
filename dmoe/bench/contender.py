"""One way to compute the layer, as the rounds of a benchmark time it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer's forward and backward."""

    run: Callable[[], None]
    results: Callable[[], dict[str, Tensor]] = dict
    """Output and gradients by name, for the comparison of two contenders."""
    forward: Callable[[], object] | None = None


class CannotCompare(Exception):
    """A library that is installed and does not do the same work; the message says what differs."""


def clear(module: nn.Module, x: Tensor) -> None:
    """Forget all gradients."""
    module.zero_grad(set_to_none=True)
    x.grad = None


def from_module(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    grad: Tensor,
    weight_gradients: Callable[[], dict[str, Tensor]],
) -> Contender:
    """Make a contender of another library's layer.

    Args:
        module: the layer; its gradients are forgotten before each run.
        forward: from x [1, T, D] to y of the same shape.
        x: input; copied.
        grad: gradient of y.
        weight_gradients: of the router [E, D], of the experts' `in` [E, 2F, D] and `out`
            [E, D, F], by these names; called after a backward.
    """
    x = x.detach().clone().requires_grad_()

    def run() -> None:
        clear(module, x)
        torch.autograd.backward(forward(x), grad)

    def results() -> dict[str, Tensor]:
        run()
        assert x.grad is not None
        return {"y": forward(x), "x": x.grad, **weight_gradients()}

    return Contender(run, results, lambda: forward(x))
