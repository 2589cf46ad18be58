"""Experts of different shape, a grouped GEMM for each class of equal ones.

Every matrix is a parameter of its own, under the global id of its expert (`experts.3.w0`), and not a slice of a stack: so a checkpoint
finds it on any number of ranks, and FSDP2 and the optimizer need to know nothing of classes. The price is that the matrices of a
class are stacked when it computes: a copy of the weights in each forward, which under autocast is the cast to bf16 that a stack would
need as well; a class of one expert is not copied.

Letters: R rows, D width in, M width out, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import matrices
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.grouped_mlp import feed_forward, grouped_linear
from dmoe.moe.placement import ExpertPlacement, balanced_placement
from dmoe.moe.rng import normal_


class HeterogeneousExperts(Experts):
    """Expert e computes `... activation(x @ w0) @ w1 ...` through the hidden widths `shapes[e]`; `[]` is the linear map `x @ w0`.

    No biases: zero stays zero, so an empty slot contributes nothing. Rows stand by place: class by class, and last those of places
    that no expert has (padded exchange), which stay zero. One host read of `per_expert` where it is a tensor, for where a class
    begins.
    """

    def __init__(self, kind: str, dim: int, shapes: Sequence[Sequence[int]], out_dim: int) -> None:
        super().__init__(kind, tuple(matrices(shape, dim, out_dim, kind) for shape in shapes))
        self.out_dim = out_dim
        for expert, sizes in enumerate(self.matrices):
            one = nn.Module()
            for n, size in enumerate(sizes):
                one.register_parameter(f"w{n}", nn.Parameter(torch.empty(size)))
            self.add_module(str(expert), one)
        self.owned = self.placement(1).experts[0]

    def forward(self, rows_RD: Tensor, per_expert: TokensPerExpert) -> Tensor:
        sizes = None if isinstance(per_expert, int) else per_expert.tolist()
        parts, start, place = list[Tensor](), 0, 0
        for _, members in groupby(self.owned, key=lambda expert: self.matrices[expert]):
            experts = list(members)
            counts = (
                per_expert
                if isinstance(per_expert, int)
                else per_expert[place : place + len(experts)]
            )
            if isinstance(counts, int):
                rows = len(experts) * counts
            else:
                rows = sum(sizes[place : place + len(experts)])  # type: ignore[index]
            parts.append(self._one_class(experts, rows_RD[start : start + rows], counts))
            start, place = start + rows, place + len(experts)
        if start < len(rows_RD):
            parts.append(rows_RD.new_zeros(len(rows_RD) - start, self.out_dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one_class(self, experts: list[int], rows: Tensor, counts: TokensPerExpert) -> Tensor:
        stacks = [
            self._stack(experts, n, rows.dtype) for n in range(len(self.matrices[experts[0]]))
        ]
        if len(stacks) == 2:
            return feed_forward(self.kind, rows, stacks[0], stacks[1], counts)
        for n, stack in enumerate(stacks):
            rows = grouped_linear(ACTIVATION_FNS[self.kind](rows) if n else rows, stack, counts)
        return rows

    def _stack(self, experts: list[int], n: int, dtype: torch.dtype) -> Tensor:
        """The n-th matrices of experts of one shape, [e, rows, columns]."""
        weights = [self.weight(expert, n).to(dtype) for expert in experts]
        return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)

    def weight(self, expert: int, n: int) -> Tensor:
        """The n-th matrix of an expert of this rank, by its global id."""
        return self.get_submodule(str(expert)).get_parameter(f"w{n}")

    def placement(self, ranks: int) -> ExpertPlacement:
        """By longest processing time first: `ownership.py` has the rule."""
        return balanced_placement(self.multiply_adds, self.matrices, ranks)

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        self.owned = placement.experts[rank]
        for expert in range(self.num_experts):
            if expert not in self.owned:
                delattr(self, str(expert))

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Keyed by the global id, and as `MLPExperts` does it: of a shape `[expert_dim]` both have the same weights."""
        for expert in self.owned:
            last = len(self.matrices[expert]) - 1
            for n in range(last):
                normal_(
                    self.weight(expert, n),
                    std,
                    seed,
                    "expert",
                    layer,
                    expert,
                    "in" if n == 0 else f"hidden.{n}",
                )
            normal_(self.weight(expert, last), out_std, seed, "expert", layer, expert, "out")


def mixed_reference(
    experts: HeterogeneousExperts, rows_RD: Tensor, expert_R: Sequence[int]
) -> Tensor:
    """Row r through expert `expert_R[r]`, one row at a time; -1 is a place without an expert. For tests."""
    out = []
    for row, expert in zip(rows_RD, expert_R, strict=True):
        for n in range(len(experts.matrices[expert]) if expert >= 0 else 0):
            row = (
                ACTIVATION_FNS[experts.kind](row.unsqueeze(0))[0] if n else row
            ) @ experts.weight(expert, n)
        out.append(row if expert >= 0 else row.new_zeros(experts.out_dim))
    return torch.stack(out) if out else rows_RD.new_zeros(0, experts.out_dim)
