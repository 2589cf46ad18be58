"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021). Function composition: f_m after, or beside, a frozen f.

    y = h + curve(h down_m) up_m          h = f(x), the frozen output: `input_kind="output"`, in sequence
    y = h + curve(x down_m) up_m          `input_kind="input"`: the parallel adapter of He et al. 2022

down [M, D, F] random, up [M, F, O] zero, so a fresh module changes nothing. The residual is the frozen output itself. No biases, as in
dmoe's experts. Cost a row: 2 F (D + O) FLOPs.

Letters: M modules, R rows, D width read, O width out, F width of the bottleneck.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED
from dmoe.modular.banks.base import AdapterBank, InputKind, grouped_product, vector_per_row
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.rng import normal_

ACTIVATIONS = tuple(sorted(set(ACTIVATION_FNS) - GATED))


class Adapter(AdapterBank):
    """Args:
    hidden: F.
    activation: relu or gelu.
    reads: `output` (after the frozen module) or `input` (beside it).
    """

    composition = "function"

    def __init__(
        self,
        num_modules: int,
        in_dim: int,
        out_dim: int,
        *,
        hidden: int = 16,
        activation: str = "relu",
        input_kind: InputKind = "output",
    ) -> None:
        super().__init__(num_modules, in_dim, out_dim)
        if activation not in ACTIVATIONS:
            raise ConfigError(
                "activation", activation, f"must be one of {', '.join(ACTIVATIONS)}", "use relu"
            )
        if reads not in ("input", "output"):
            raise ConfigError(
                "reads",
                reads,
                "must be input or output",
                "use output, the adapter after the frozen module",
            )
        self.kind, self.input_kind = activation, reads
        self.down = nn.Parameter(torch.empty(num_modules, self.row_dim, hidden))
        self.up = nn.Parameter(torch.empty(num_modules, hidden, out_dim))
        self.initialize(0, 0)

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        hidden_RF = ACTIVATION_FNS[self.kind](grouped_product(rows_RD, self.down, tokens_per_module))
        return grouped_product(hidden_RF, self.up, tokens_per_module)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        hidden_F = row_D @ self.down[module]
        bent_F = (
            hidden_F.clamp(min=0)
            if self.kind == "relu"
            else hidden_F * 0.5 * (1 + torch.erf(hidden_F / math.sqrt(2)))
        )
        return bent_F @ self.up[module]

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        normal_(
            self.down[local], 1 / math.sqrt(self.row_dim), seed, "module", layer, module, "down"
        )
        with torch.no_grad():
            self.up[local].zero_()


class Scale(AdapterBank):
    composition = "function"
    input_kind = "output"

    def __init__(self, num_modules: int, in_dim: int, out_dim: int) -> None:
        super().__init__(num_modules, in_dim, out_dim)
        self.l = nn.Parameter(torch.empty(num_modules, out_dim))
        self.initialize(0, 0)

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        return rows_RD * vector_per_row(self.l - 1, rows_RD, tokens_per_module)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        return row_D * (self.l[module] - 1)

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        with torch.no_grad():
            self.l[local].fill_(1.0)
