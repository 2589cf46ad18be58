"""AdamW with its moments in bfloat16, rounded stochastically: 4 bytes per weight instead of 8.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = w - lr decay w - lr m' / (sqrt(v') + eps)

in float32 with the bias-corrected m', v' of the moments before they are rounded; then bfloat16
keeps m and v. Rounding to the nearest would never move a moment whose change is below half a step
(1/512 of it); rounded up with the probability of the lost part, its expectation is exact (Gupta et
al. 2015, "Deep learning with limited numerical precision").

    kept = top 16 bits of (bits of x + r),  r of 16 random bits

r is a hash of (seed, name of the parameter, step, index of the element in the full parameter), the
expert's global id included. So equal gradients give equal bits on any number of ranks, at any EP
size and under FSDP2; where ranks round a gradient differently, a moment may differ by one step of
bfloat16.

Cost: about 30 elementwise passes per moment over chunks that fit the cache, no host read, no
collective. Memory: temporaries of one chunk, or of one row of the first dimension.

Letters: N elements, R rows of the first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dmoe.distributed.expert_parallel import moe_layers
from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.state_dict import MOMENTS
from dmoe.moe.rng import generator

CHUNK = 1 << 18
MULTIPLIERS = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))
"""Of splitmix64 (Steele et al. 2014), as signed numbers: torch has no uint64 arithmetic."""
MASK = (1 << 16) - 1
Rows = Callable[[], tuple[int, ...]]
"""The global ids of a stack's rows."""


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW whose moments are bfloat16.

    Args:
        groups: parameters with `weight_decay`.
        lr: learning rate of all groups.
        betas, eps: of AdamW.
        model: names the parameters, and says which experts a stack holds.
        ep_rank: this rank's place among those that share the experts.
        seed: key of the rounding.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        model: nn.Module,
        ep_rank: int,
        seed: int,
    ) -> None:
        for group in groups:
            group["moment_dtype"] = torch.bfloat16
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.keys: dict[Tensor, int] = {
            p: generator(seed, "moments", name).initial_seed()
            for name, p in model.named_parameters()
        }
        self.rows: dict[Tensor, Rows] = {}
        for layer in moe_layers(model):
            for parameter in layer.experts.parameters():
                self.rows[parameter] = partial(_owned, layer, ep_rank)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. No collective."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if not (state := self.state[parameter]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            zeros = (torch.zeros_like(parameter, dtype=torch.bfloat16) for _ in MOMENTS)
            state.update(zip(MOMENTS, zeros, strict=True))
        step = state["step"].add_(1)
        (beta1, beta2), rate = group["betas"], group["lr"]
        unbias1, unbias2 = (1 - beta ** step.double() for beta in (beta1, beta2))
        tensors = [parameter, parameter.grad, *(state[name] for name in MOMENTS)]
        key = step.long() * MULTIPLIERS[1] + self.keys[parameter]
        held = [local_tensor(tensor) for tensor in tensors if tensor is not None]
        for index_N, parts in self._chunks(parameter, held):
            weight, grad, *moments = parts
            wide = weight.dtype
            first, second = (moment.to(wide) for moment in moments)
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            direction = (second / unbias2.to(wide)).sqrt_().add_(group["eps"])
            direction = (first / unbias1.to(wide)).div_(direction)
            weight.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-rate)
            random = random_bits(index_N, key)
            for moment, value, shift in zip(moments, (first, second), (16, 40), strict=True):
                moment.copy_(round_stochastically(value, (random >> shift) & MASK).view_as(moment))

    def _chunks(
        self, parameter: Tensor, tensors: list[Tensor]
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield indices in the full parameter, and views of the local tensors, by runs of rows."""
        shape, offset = tuple(parameter.shape), (0,) * parameter.ndim
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
        local = tensors[0].shape
        if not local.numel():
            return
        device = parameter.device
        inner = torch.zeros((), dtype=torch.int64, device=device)
        for dim in range(1, parameter.ndim):
            place = torch.arange(offset[dim], offset[dim] + local[dim], device=device)
            inner = inner.unsqueeze(-1) + place * math.prod(shape[dim + 1 :])
        size, ids = math.prod(shape[1:]), None
        if parameter in self.rows:
            owned = self.rows[parameter]()
            ids = torch.tensor(owned, device=device)
        count = max(1, CHUNK // max(1, inner.numel()))
        for start in range(0, local[0] if local else 1, count):
            if not local:
                yield inner.view(1), [tensor.view(1) for tensor in tensors]
                return
            end = min(start + count, local[0])
            row_R = torch.arange(start + offset[0], end + offset[0], device=device)
            row_R = row_R if ids is None else ids[row_R]
            index = row_R.view(-1, *[1] * inner.ndim) * size + inner
            yield index, [tensor[start:end] for tensor in tensors]


def _owned(layer: Any, ep_rank: int) -> tuple[int, ...]:
    """Return the experts that a stack holds now: a placement may change."""
    return layer.placement.experts[ep_rank]  # type: ignore[no-any-return]


def random_bits(index_N: Tensor, key: Tensor) -> Tensor:
    """Return 64 bits per index, int64: the finaliser of splitmix64 of `index * golden + key`."""
    x = index_N * MULTIPLIERS[0] + key
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= MULTIPLIERS[1]
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= 0x94D049BB133111EB - (1 << 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def round_stochastically(value: Tensor, random: Tensor) -> Tensor:
    """Round to bfloat16: up in size with the probability of what the lower 16 bits hold.

    Args:
        value: finite; float64 is first rounded to float32.
        random: integers of 16 bits.
    """
    bits = value.float().contiguous().view(torch.int32)
    return (bits + random.to(torch.int32)).bitwise_and_(~MASK).view(torch.float32).bfloat16()
