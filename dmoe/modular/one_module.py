"""One module of a bank is trained and the others keep their bits: continual learning by addition (Rusu et al. 2016; MAD-X).

Modules are slices of one stacked parameter, and a zero gradient is not enough: weight decay shrinks every slice, and moments of earlier
steps go on moving it. So the gradient of the others is zeroed before it is summed (the norm and the clip see the one module alone), and
after each step of the optimizer their bits are put back. Cost: a copy of the bank, and a copy of it a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.attach import layers
from dmoe.modular.core import select

__all__ = ["train_one"]


def train_one(model: nn.Module, module: int, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """From now on steps of `optimizer` change module `module` (its global id) of every bank, and nothing else.

    Everything but the banks is frozen (`select(model, "one_module")`). After sharding, on every rank; `optimizer` holds the banks'
    parameters. Returns what ends it. Raises ConfigError for a module that is not there, or that FSDP2 has split.
    """
    for name, layer in layers(model).items():
        if not 0 <= module < layer.experts.num_modules:
            allowed = f"{name} has the modules 0 to {layer.experts.num_modules - 1}"
            raise ConfigError("module", module, allowed, "name one of them, or grow the bank")
        if any(type(parameter.data) is not Tensor for parameter in layer.experts.parameters()):
            allowed = f"splits the modules at {name} among the ranks, and the bits of whole ones are put back here"
            raise ConfigError("parallel.mode", "fsdp", allowed, "use ddp")
    select(model, "one_module")
    handles: list[Any] = []
    kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    for layer in layers(model).values():
        bank = layer.experts
        for parameter in bank.parameters():
            others_e = torch.arange(len(parameter), device=parameter.device) + bank.first != module
            kept.append((parameter, others_e, parameter.detach()[others_e].clone()))
            handles.append(parameter.register_hook(_without(others_e)))  # type: ignore[no-untyped-call]

    def put_back(*_: object) -> None:
        with torch.no_grad():
            for parameter, others_e, value in kept:
                parameter[others_e] = value

    handles.append(optimizer.register_step_post_hook(put_back))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _without(others_e: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(others_e.view(-1, *[1] * (gradient.dim() - 1)), 0.0)
