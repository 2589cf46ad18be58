"""Fixed routing: modules and weights are given, not learned.

    constant:  every token uses module m with weight[m]; what `merge` computes, and what a single
               module needs
    table:     a token with label l uses the modules rows[l], in this order, with equal weights

A table combines modules that were never trained together: the row (language, task) of MAD-X
(Pfeiffer et al. 2020), or task arithmetic (Ilharco et al. 2023) by a weighted sum.
`dmoe.moe.routers.FixedRouter` is the table whose label l has the modules lK to lK+K-1. The scores
are the positive weights, normalized; load-balancing losses of them train nothing. No host sync.

Letters: T tokens, M modules, K modules per token, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.schema import RouterConfig
from dmoe.moe.inputs import per_token_input
from dmoe.moe.routers.base import RouterModule, valid_choices
from dmoe.moe.routers.projection import router_dtype
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class ConstantRouter(RouterModule):
    """Every token uses every module, with one vector of weights, which may be negative."""

    weight_M: Tensor

    def __init__(self, weights: Sequence[float], layer: int = 0) -> None:
        super().__init__(RouterConfig(kind="fixed"), len(weights), len(weights), layer)
        self.weights = tuple(weights)
        self.register_buffer("weight_M", torch.tensor(weights, dtype=torch.float64))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        self.weight_M.copy_(self.weight_M.new_tensor(self.weights))

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        expert_TM = torch.arange(self.num_experts, device=x_TD.device).repeat(len(x_TD), 1)
        return fixed_routing(
            expert_TM,
            self.weight_M.to(router_dtype(x_TD)).expand(expert_TM.shape),
            self.num_experts,
            context,
        )


class TableRouter(RouterModule):
    """The modules of each label.

    Rows may differ in length. A token whose label has none gets the frozen output.
    """

    module_LK: Tensor
    """int64; -1 pads rows that are shorter than the longest."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        num_modules: int,
        *,
        weight: float = 1.0,
        layer: int = 0,
    ) -> None:
        """Create the router.

        Args:
            rows: the modules of each label, in order.
            num_modules: M.
            weight: weight of each choice.
            layer: index of the layer.
        """
        check_rows(rows, num_modules)
        longest = max(len(row) for row in rows)
        super().__init__(RouterConfig(kind="fixed"), num_modules, longest, layer)
        self.weight = weight
        self.rows = [[*row, *[-1] * (longest - len(row))] for row in rows]
        self.register_buffer("module_LK", torch.tensor(self.rows))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        self.module_LK.copy_(self.module_LK.new_tensor(self.rows))

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        """Look up each token's modules.

        Raises: ValueError without `context.label_T`; IndexError of torch for a label without a row.
        """
        module_TK = self.module_LK.index_select(0, token_labels(context, x_TD, "table"))
        weight_TK = x_TD.new_full(module_TK.shape, self.weight, dtype=router_dtype(x_TD))
        return fixed_routing(
            module_TK.clamp(min=0), weight_TK, self.num_experts, context, present_TK=module_TK >= 0
        )

    def add_row(self, row: Sequence[int]) -> int:
        """Append a row of at most the longest row's length; returns its label."""
        check_rows([row], self.num_experts)
        if len(row) > self.top_k:
            raise ConfigError(
                "row",
                list(row),
                f"must have at most {self.top_k} modules",
                "make the table with a longer row",
            )
        # from the buffer, because a loaded table is there only
        self.rows = [*self.module_LK.tolist(), [*row, *[-1] * (self.top_k - len(row))]]
        self.module_LK = self.module_LK.new_tensor(self.rows)
        return len(self.module_LK) - 1


def token_labels(context: TokenContext, x_TD: Tensor, kind: str) -> Tensor:
    """Return each token's label, int64 [T]; 0 for padding.

    Labels of padding may be any number: -100 marks targets that a loss ignores.
    """
    label_T = per_token_input(
        context.label_T, x_TD, kind, "label_T", "label (task, language or domain)"
    )
    return label_T if context.valid_T is None else label_T.masked_fill(~context.valid_T, 0)


def check_rows(rows: Sequence[Sequence[int]], num_modules: int) -> None:
    """Raise ConfigError for unknown or repeated modules, or if no row has any."""
    for row in rows:
        if len(set(row)) < len(row) or not all(0 <= module < num_modules for module in row):
            allowed = f"must name modules from 0 to {num_modules - 1}, each at most once"
            raise ConfigError("row", list(row), allowed, "name existing modules")
    if not any(rows):
        raise ConfigError(
            "rows",
            list(rows),
            "must name a module for some label",
            "give at least one row with a module",
        )


def fixed_routing(
    expert_TK: Tensor,
    weight_TK: Tensor,
    num_modules: int,
    context: TokenContext,
    *,
    present_TK: Tensor | None = None,
) -> Routing:
    """Build the routing of given modules and weights.

    Args:
        expert_TK: int64 module ids; any valid id where `present_TK` is False.
        weight_TK: float32 or float64.
        num_modules: M.
        context: `valid_T`.
        present_TK: bool; False pads tokens with fewer than K modules. None: all True.
    """
    selected_TK = valid_choices(expert_TK, context)
    if present_TK is not None:
        selected_TK = present_TK if selected_TK is None else selected_TK & present_TK
        weight_TK = weight_TK.masked_fill(~present_TK, 0.0)
    positive_TK = weight_TK.clamp(min=0)
    share_TK = positive_TK / (positive_TK.sum(-1, keepdim=True) + 1e-20)
    score_TM = weight_TK.new_zeros(len(expert_TK), num_modules).scatter_add(1, expert_TK, share_TK)
    return Routing(
        expert_TK,
        weight_TK,
        score_TM,
        torch.full_like(score_TM, -math.log(num_modules)),
        selected_TK=selected_TK,
    )
