"""Experts of different shapes: one grouped GEMM per class of equal shapes.

Every matrix is a parameter of its own, named by the global id of its expert (`experts.3.w0`), not a
slice of a stack: so a checkpoint finds it on any number of ranks, and FSDP2 and the optimizer know
nothing of classes. The price: the matrices of a class are stacked in each forward, a copy of the
weights (under autocast, the cast to bf16 that a stack would need as well); a class of one expert is
not copied.

Letters: R rows, D input width, M output width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import matrix_shapes
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.grouped_mlp import feed_forward
from dmoe.moe.experts.grouped_product import grouped_linear
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.placement import ExpertPlacement, balanced_placement
from dmoe.moe.rng import normal_


class HeterogeneousExperts(Experts):
    """Experts of different shapes: expert e computes `... activation(x @ w0) @ w1 ...`.

    Its hidden widths are `shapes[e]`; `[]` is the linear map `x @ w0`. No biases: zero stays zero,
    so an empty slot contributes nothing. Rows are ordered by physical expert: class by class, and
    last those of unused physical experts (padded exchange), which stay zero. One host read of
    `tokens_per_expert` if it is a tensor, for the class boundaries.
    """

    def __init__(self, kind: str, dim: int, shapes: Sequence[Sequence[int]], out_dim: int) -> None:
        super().__init__(kind, tuple(matrix_shapes(shape, dim, out_dim, kind) for shape in shapes))
        self.out_dim = out_dim
        for expert, sizes in enumerate(self.matrices):
            module = nn.Module()
            for n, size in enumerate(sizes):
                module.register_parameter(f"w{n}", nn.Parameter(torch.empty(size)))
            self.add_module(str(expert), module)
        self.owned = self.placement(1).experts[0]

    def forward(self, rows_RD: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        sizes = None if isinstance(tokens_per_expert, int) else tokens_per_expert.tolist()
        parts, start, first = list[Tensor](), 0, 0
        for _, members in groupby(self.owned, key=lambda expert: self.matrices[expert]):
            experts = list(members)
            counts = (
                tokens_per_expert
                if isinstance(tokens_per_expert, int)
                else tokens_per_expert[first : first + len(experts)]
            )
            if isinstance(counts, int):
                rows = len(experts) * counts
            else:
                rows = sum(sizes[first : first + len(experts)])  # type: ignore[index]
            parts.append(self._one_class(experts, rows_RD[start : start + rows], counts))
            start, first = start + rows, first + len(experts)
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
        """Stack the n-th matrices of experts of one shape, [e, rows, columns]."""
        weights = [self.weight(expert, n).to(dtype) for expert in experts]
        return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)

    def weight(self, expert: int, n: int) -> Tensor:
        """Return the n-th matrix of a local expert, by its global id."""
        # by name: torch.func.functional_call puts plain tensors there
        matrix: Tensor = getattr(self.get_submodule(str(expert)), f"w{n}")
        return matrix

    def placement(self, ranks: int) -> ExpertPlacement:
        """Place experts by longest processing time first (`placement.py`)."""
        return balanced_placement(self.multiply_adds, self.matrices, ranks)

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        self.owned = placement.experts[rank]
        for expert in range(self.num_experts):
            if expert not in self.owned:
                delattr(self, str(expert))

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Draw weights keyed by global id, equal to `MLPExperts` for shapes `[expert_dim]`."""
        for expert in self.owned:
            last = len(self.matrices[expert]) - 1
            for n in range(last):
                name = "in" if n == 0 else f"hidden.{n}"
                normal_(self.weight(expert, n), std, seed, "expert", layer, expert, name)
            normal_(self.weight(expert, last), out_std, seed, "expert", layer, expert, "out")
