"""A model and loop of one's own for the tests of `parallelize`; the truth is one plain process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmoe
from dmoe.config.schema import BalanceConfig, ExpertsConfig

State = dict[str, np.ndarray]
MODES = ("ddp", "fsdp", None)


class View(nn.Module):
    """Returns a view of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(0, 1)).tanh()).view(x.shape)


class Net(nn.Module):
    """Two layers of four experts with losses and a bias, and a block between them; float64."""

    def __init__(self, experts: ExpertsConfig | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        balance = BalanceConfig(switch=0.1, z=0.01, bias=0.01)
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(
            dmoe.MoE(8, 12, 4, 2, layer=layer, balance=balance, experts=experts)
            for layer in range(2)
        )
        self.blocks.insert(1, View())
        for layer in self.moes():
            layer.initialize(0, std=0.3)
        self.double()

    def moes(self) -> list[dmoe.MoE]:
        return [module for module in self.modules() if isinstance(module, dmoe.MoE)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, aux = self.inner(x), x.new_zeros(())
        for layer in self.blocks:
            if isinstance(layer, View):
                viewed = layer(x)
                viewed += x  # in place: FSDP2 loses its backward hook if the output is a view
                x = viewed
                continue
            out = layer(x)
            x, aux = x + out.y, aux + 0.1 * out.aux["switch"] + 0.01 * out.aux["z"]
        return self.outer(x), aux


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, 6, generator=random, dtype=torch.float64)
    return x, torch.randint(3, (8, 5), generator=random)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits, aux = model(x)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()) + aux


def arrays(state: dict[str, Any]) -> State:
    return {name: value.detach().numpy() for name, value in state.items()}


def truth(
    parts: int, steps: Iterable[int] = range(2), make: Callable[[], Net] = Net
) -> tuple[list[float], State]:
    """Train on one process, without dmoe.distributed: the mean of the losses of `parts` parts."""
    net = make()
    optimizer, norms = torch.optim.AdamW(net.parameters(), lr=0.01), []
    for step in steps:
        x, y = batch(step)
        pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
        torch.stack([loss_of(net, *pair) for pair in pairs]).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        for layer in net.moes():
            layer.update_bias()
    return norms, arrays(net.state_dict())


def own_loop(
    rank: int,
    world: int,
    model: dmoe.ParallelModel,
    accumulate: int = 1,
    no_sync: bool = True,
    steps: Iterable[int] = range(2),
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[list[float], State]:
    """Train the same on this rank's parts of each batch."""
    optimizer, norms = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01), []
    for step in steps:
        xs, ys = (part.chunk(world * accumulate) for part in batch(step))
        for index in range(accumulate):
            alone = no_sync and index < accumulate - 1
            with model.no_sync() if alone else nullcontext():
                part = index * world + rank
                model.backward(loss_of(model, xs[part], ys[part]) / accumulate)
        norms.append(model.clip_grad_norm_(0.5))
        optimizer.step()
        optimizer.zero_grad()
    return norms, arrays(model.state_dict())


def compare(found: tuple[list[float], State], expected: tuple[list[float], State]) -> float:
    """Return the largest difference; names must be equal."""
    assert found[1].keys() == expected[1].keys()
    norms = [abs(a - b) for a, b in zip(found[0], expected[0], strict=True)]
    return max(*norms, *(float(np.abs(found[1][k] - v).max()) for k, v in expected[1].items()))
