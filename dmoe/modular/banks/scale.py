"""Rescaling modules ((IA)^3, Liu et al. 2022). Function composition: module m multiplies the frozen output by a vector.

    y = h * l_m          so the module's contribution, which routing weighs, is h * (l_m - 1);    l [M, O] ones at the start

The paper puts one on the keys, one on the values and one on the inside of the feed-forward. Behind a linear map it merges: the vector
scales the rows of the frozen weight. Cost a row: 2 O FLOPs.

Letters: M modules, R rows, O width of the frozen output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.modular.banks.base import AdapterBank, spread
from dmoe.moe.dispatch import TokensPerExpert


class Scale(AdapterBank):
    composition = "function"
    reads = "output"

    def __init__(self, num_modules: int, in_dim: int, out_dim: int) -> None:
        super().__init__(num_modules, in_dim, out_dim)
        self.l = nn.Parameter(torch.empty(num_modules, out_dim))
        self.initialize(0, 0)

    def forward(self, rows_RD: Tensor, per_module: TokensPerExpert) -> Tensor:
        return rows_RD * spread(self.l - 1, rows_RD, per_module)

    def one(self, row_D: Tensor, module: int) -> Tensor:
        return row_D * (self.l[module] - 1)

    def draw(self, local: int, seed: int, layer: int, module: int) -> None:
        with torch.no_grad():
            self.l[local].fill_(1.0)
