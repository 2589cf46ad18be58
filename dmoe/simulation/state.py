"""Bytes of weights, gradients and moments on one rank: of a real engine, and of a dry run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.fsdp import blocks
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.optimizers.offloaded_adamw import OffloadedAdamW, padded
from dmoe.distributed.state_dict import MOMENTS
from dmoe.models.base import Model


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds through a step, of dense parameters and of experts."""

    weights: int
    gradients: int
    moments: int
    """On the device."""
    dense_parameters: int
    expert_parameters: int
    """Numbers of parameters on this rank."""
    buckets: int = 0
    """Part of the gradients that lives as long as the model: DDP's buckets."""
    host_moments: int = 0
    """Bytes of both moments in the memory of the host, padding included."""

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, count: int) -> StateBytes:
        return StateBytes(*(count * value for value in self._values()))

    def _values(self) -> list[int]:
        return list(vars(self).values())  # `astuple` copies each of them


def kind_of(block: nn.Module) -> str:
    """Return what makes two blocks equal for a plan: classes, and parameters with their shapes."""
    classes = ",".join(type(module).__name__ for module in block.modules())
    shapes = ",".join(
        f"{name}{tuple(p.shape)}{p.requires_grad}" for name, p in block.named_parameters()
    )
    return f"{classes};{shapes}"


def states_of_blocks(
    model: Model, kinds: list[str], optimizer: torch.optim.Optimizer, has_buckets: bool
) -> dict[str, StateBytes]:
    """Return the state of one block of each kind, and of what is in no block."""
    of_experts = set(map(id, expert_parameters(model).values()))
    rest = (optimizer, of_experts, has_buckets)
    found, seen = dict[str, StateBytes](), set[int]()
    for kind, block in zip(kinds, blocks(model), strict=True):
        parameters = list(block.parameters())
        seen |= set(map(id, parameters))
        found.setdefault(kind, state_bytes(parameters, *rest))
    others = [p for p in model.parameters() if id(p) not in seen]
    return found | {"": state_bytes(others, *rest)}


def state_bytes(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    of_experts: set[int],
    has_buckets: bool = False,
) -> StateBytes:
    """Count what this rank holds of some parameters. For a real optimizer and for a dry one.

    A gradient has the size of its weight. `of_experts`: ids of the parameters that are an expert's;
    `has_buckets`: DDP holds the gradients of the others.
    """
    weights = gradients = moments = buckets = on_host = 0
    is_offloaded = isinstance(optimizer, OffloadedAdamW)
    numbers = {False: 0, True: 0}
    for parameter in parameters:
        local = local_tensor(parameter)
        size = local.numel() * local.element_size()
        weights += size
        gradients += size if parameter.requires_grad else 0
        numbers[id(parameter) in of_experts] += local.numel()
        if has_buckets and parameter.requires_grad and id(parameter) not in of_experts:
            buckets += size
        if is_offloaded and parameter.requires_grad:
            on_host += len(MOMENTS) * padded(local.numel()) * local.element_size()
            continue
        moments += sum(
            local_tensor(value).numel() * value.element_size()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor) and value.dim()
        )
    return StateBytes(weights, gradients, moments, numbers[False], numbers[True], buckets, on_host)
