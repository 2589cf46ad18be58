"""Function composition: bottleneck adapters and (IA)^3 scaling, after or beside a frozen module.

Letters: M modules, R rows, D input width, O output width, F bottleneck width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED
from dmoe.modular.banks.base import AdapterBank, InputKind, grouped_product, vector_per_row
from dmoe.moe.experts.activation import ACTIVATION_FNS
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.rng import normal_

ACTIVATIONS = tuple(sorted(set(ACTIVATION_FNS) - GATED))


class Adapter(AdapterBank):
    """Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021).

    y = h + act(h down_m) up_m     h = f(x), the frozen output; `input_kind="output"`: sequential
    y = h + act(x down_m) up_m     `input_kind="input"`: the parallel adapter of He et al. 2022

    `down` [M, D, F] is random and `up` [M, F, O] zero, so a new module changes nothing. The
    residual is the frozen output. No biases, as in dmoe's experts. Cost: 2 F (D + O) FLOPs per row.
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
        """Create the bank.

        Args:
            num_modules: M.
            in_dim, out_dim: widths of the target module.
            hidden: F.
            activation: relu or gelu.
            input_kind: `output` (after the target module) or `input` (beside it).
        """
        super().__init__(num_modules, in_dim, out_dim)
        if activation not in ACTIVATIONS:
            raise ConfigError(
                "activation", activation, f"must be one of {', '.join(ACTIVATIONS)}", "use relu"
            )
        if input_kind not in ("input", "output"):
            raise ConfigError(
                "input_kind",
                input_kind,
                "must be input or output",
                "use output, the adapter after the target module",
            )
        self.kind, self.input_kind = activation, input_kind
        self.down = nn.Parameter(torch.empty(num_modules, self.row_dim, hidden))
        self.up = nn.Parameter(torch.empty(num_modules, hidden, out_dim))
        self.initialize(0, 0)

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        hidden_RF = grouped_product(rows_RD, self.down, tokens_per_module)
        activated_RF = ACTIVATION_FNS[self.kind](hidden_RF)
        return grouped_product(activated_RF, self.up, tokens_per_module)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        hidden_F = row_D @ self.down[module]
        activated_F = (
            hidden_F.clamp(min=0)
            if self.kind == "relu"
            else hidden_F * 0.5 * (1 + torch.erf(hidden_F / math.sqrt(2)))
        )
        return activated_F @ self.up[module]

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        std = 1 / math.sqrt(self.row_dim)
        normal_(self.down[local], std, seed, "module", layer, module, "down")
        with torch.no_grad():
            self.up[local].zero_()


class Scale(AdapterBank):
    """Rescaling modules ((IA)^3, Liu et al. 2022).

    y = h * l_m,  so the module's contribution, which routing weights, is h * (l_m - 1)

    `l` [M, O] is 1 at the start. The paper scales keys, values and the hidden layer of the
    feed-forward. After a Linear it can be merged: it scales the rows of the frozen weight.
    Cost: 2 O FLOPs per row.
    """

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
