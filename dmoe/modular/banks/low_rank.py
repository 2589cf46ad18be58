"""Low-rank modules (LoRA, Hu et al. 2021). Parameter composition: module m adds a matrix of rank r to a frozen one.

    y = x W + (alpha / r) * (x A_m) B_m          A [M, D, r] random, B [M, r, O] zero, so a fresh module changes nothing

A routed mixture of them is MoLoRA / LoRAMoE (Zadouri et al. 2023, Dou et al. 2023); the frozen matrix is the shared expert.
Cost a row: 2 r (D + O) FLOPs; under EP the row travels with width D there and O back.

Letters: M modules, R rows, D width in, O width out, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.banks.base import AdapterBank, product
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.rng import normal_


class LowRank(AdapterBank):
    """Args:
    rank: r.
    alpha: the product is scaled by alpha / r; default r, so that the scale is 1.
    """

    composition = "parameter"
    reads = "input"

    def __init__(
        self,
        num_modules: int,
        in_dim: int,
        out_dim: int,
        *,
        rank: int = 8,
        alpha: float | None = None,
    ) -> None:
        super().__init__(num_modules, in_dim, out_dim)
        if rank < 1:
            raise ConfigError("rank", rank, "must be at least 1", "use 4 to 64")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.a = nn.Parameter(torch.empty(num_modules, in_dim, rank))
        self.b = nn.Parameter(torch.empty(num_modules, rank, out_dim))
        self.initialize(0, 0)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, rows_RD: Tensor, per_module: TokensPerExpert) -> Tensor:
        return product(product(rows_RD, self.a, per_module), self.b, per_module) * self.scale

    def one(self, row_D: Tensor, module: int) -> Tensor:
        return self.scale * (row_D @ self.a[module] @ self.b[module])

    def draw(self, local: int, seed: int, layer: int, module: int) -> None:
        normal_(self.a[local], 1 / math.sqrt(self.in_dim), seed, "module", layer, module, "a")
        with torch.no_grad():
            self.b[local].zero_()

    def delta(self, local: int) -> Tensor:
        return (self.a[local] @ self.b[local]).detach() * self.scale
