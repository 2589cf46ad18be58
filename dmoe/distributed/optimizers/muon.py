"""Muon: the momentum of each matrix, orthogonalised; AdamW for everything else.

    m = mu m + (1 - mu) g                          momentum, as in torch.optim.Muon
    u = mu m + (1 - mu) g                          Nesterov
    X = u / (|u| + 1e-7);  5 times: A = X X^T;  X = a X + (b A + c A^2) X
    w = w - lr decay w - lr 0.2 sqrt(max(rows, columns)) X

(a, b, c) = (3.4445, -4.7750, 2.0315) bring the singular values near 1 (Newton-Schulz; Jordan et al.
2024). The factor gives the update the size of AdamW's, so that both share a learning rate (Liu et
al. 2025, "Muon is scalable for LLM training", 2.2).

A matrix is one linear map: every expert's of a stack, and query, key, value, gate and up where they
are stored side by side. So the result depends neither on the number of ranks that share the experts
nor on their sharding. Products are in the dtype of the weights (float32).

Cost beside AdamW's one moment less: about 30 times rows^2 x columns FLOPs per matrix (the smaller
side is squared), on every rank for what it holds in full. Under FSDP2 a parameter that is sharded
within its matrices is all-gathered first (4 bytes per weight and step, one matrix in memory at a
time), and every rank orthogonalises it; whole experts are not gathered. No host read.

Letters: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.adamw import adamw

from dmoe.distributed.gradients import local_tensor
from dmoe.distributed.state_dict import MOMENTS

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS, EPS = 5, 1e-7
Parts = tuple[int, tuple[int, ...]] | None
"""Dimension (-2 or -1) and sizes of the matrices that are stored side by side; None: one."""


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups that have `parts`, AdamW for the others.

    Args:
        groups: parameters with `weight_decay`, and `parts` for Muon's.
        lr: learning rate of all groups.
        betas, eps: of AdamW.
        momentum: mu.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "weight_decay": 0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; under FSDP2 collective over their ranks."""
        assert closure is None
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if "parts" in group:
                for parameter in trained:
                    self._muon(parameter, group)
            elif trained:
                self._adamw(trained, group)

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, mu = self.state[parameter], group["momentum"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        gradient, moment = local_tensor(parameter.grad), local_tensor(state["momentum_buffer"])
        moment.lerp_(gradient, 1 - mu)
        update = orthogonal_update(gradient.lerp(moment, mu), parameter, group["parts"])
        weight = local_tensor(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"])

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state.update({name: torch.zeros_like(parameter) for name in MOMENTS})
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal_update(local: Tensor, parameter: Tensor, parts: Parts) -> Tensor:
    """Return this rank's part of the update of a parameter, from its part of the momentum.

    Args:
        local: this rank's part.
        parameter: its sharding; a stack of experts has whole matrices wherever the expert is.
        parts: the matrices that are stored side by side.
    """
    if not isinstance(parameter, DTensor):
        return _by_matrix(local, parts)
    placements = parameter.placements
    if parameter.ndim > 2 and placements == (Shard(0),):
        return _by_matrix(local, parts)
    sharded = DTensor.from_local(
        local,
        parameter.device_mesh,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    full = _by_matrix(sharded.full_tensor(), parts)
    mesh = parameter.device_mesh
    return local_tensor(distribute_tensor(full, mesh, placements, src_data_rank=None))


def _by_matrix(update: Tensor, parts: Parts) -> Tensor:
    if parts is None:
        return _scaled(update)
    dim, sizes = parts
    return torch.cat([_scaled(part) for part in update.split(sizes, dim)], dim)


def _scaled(update_RC: Tensor) -> Tensor:
    return 0.2 * math.sqrt(max(update_RC.shape[-2:])) * newton_schulz(update_RC)


def newton_schulz(update_RC: Tensor) -> Tensor:
    """Bring the singular values of each matrix of [..., R, C] near 1; zero stays zero."""
    a, b, c = COEFFICIENTS
    x: Tensor = update_RC / (torch.linalg.matrix_norm(update_RC, keepdim=True) + EPS)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result
