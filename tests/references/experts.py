"""Experts one row at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.moe.experts import HeterogeneousExperts, ZeroCost
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.routing import DispatchPlan


def swiglu_reference(hidden_R2F: Tensor) -> Tensor:
    gate, up = hidden_R2F.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def grouped_linear_reference(rows_RI: Tensor, weight_eIO: Tensor, count_e: Tensor) -> Tensor:
    """Compute `grouped_linear` one row at a time."""
    expert_R = torch.arange(len(count_e)).repeat_interleave(count_e)
    rows = [row @ weight_eIO[e] for row, e in zip(rows_RI, expert_R.tolist(), strict=True)]
    return torch.stack(rows) if rows else rows_RI.new_zeros(0, weight_eIO.shape[2])


def mixed_reference(
    experts: HeterogeneousExperts, rows_RD: Tensor, expert_R: Sequence[int]
) -> Tensor:
    """Compute row r with expert `expert_R[r]`; -1 is an unused physical expert."""
    out = []
    for row, expert in zip(rows_RD, expert_R, strict=True):
        for n in range(len(experts.matrices[expert]) if expert >= 0 else 0):
            row = (
                ACTIVATION_FNS[experts.kind](row.unsqueeze(0))[0] if n else row
            ) @ experts.weight(expert, n)
        out.append(row if expert >= 0 else row.new_zeros(experts.out_dim))
    return torch.stack(out) if out else rows_RD.new_zeros(0, experts.out_dim)


def zero_cost_reference(module: ZeroCost, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Compute what `ZeroCost.forward` adds, one token and choice at a time."""
    rows, first = [], plan.num_experts - module.num_experts
    for t, x in enumerate(x_TD):
        width = len(x) if module.constant_JM is None else module.constant_JM.shape[1]
        total = x.new_zeros(width)
        for k, expert in enumerate(plan.expert_TK[t].tolist()):
            if expert < first or not plan.is_kept_TK[t, k]:
                continue
            name = module.names[expert - first]
            if name == "copy":
                total = total + plan.weight_TK[t, k] * x
            elif name == "constant":
                assert module.constant_JM is not None
                total = (
                    total
                    + plan.weight_TK[t, k]
                    * module.constant_JM[expert - first - module.zero - module.copy]
                )
        rows.append(total)
    return torch.stack(rows)
