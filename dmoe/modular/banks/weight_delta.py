"""Sparse modules. Parameter composition: module m adds a few numbers to a frozen matrix, at places that never change.

    y = x (W + S_m),     S_m zero but at n fixed places: value [M, n], index [M, n]

The places are random (as in random masking, Xu and Zhang 2024), or where |W| is largest (magnitude, after Frankle and Carbin 2019; the
sparse fine-tuning of Ansell et al. 2022 composes such modules by adding them). Values are zero at the start.
Cost: the e matrices of this rank are written out densely for a forward, e * D * O numbers; a row then costs 2 D O FLOPs.

Letters: M modules, e modules here, R rows, D width in, O width out, n places.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.banks.base import AdapterBank, grouped_product
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.rng import generator, normal_


class SparseDelta(AdapterBank):
    """Args:
    density: n as a part of D * O; at least one place.
    mask: `random`, places of its own for each module; `magnitude`, the same places for all, read from the frozen Linear.
    """

    composition = "parameter"
    input_kind = "input"

    index: Tensor
    """int64 [M, n]: places in the flattened [D, O], in ascending order."""

    def __init__(
        self,
        num_modules: int,
        in_dim: int,
        out_dim: int,
        *,
        density: float = 0.01,
        mask: str = "random",
    ) -> None:
        super().__init__(num_modules, in_dim, out_dim)
        if not 0 < density <= 1:
            raise ConfigError("density", density, "must be above 0 and at most 1", "use 0.01")
        if mask not in ("random", "magnitude"):
            raise ConfigError("mask", mask, "must be random or magnitude", "use random")
        self.mask = mask
        places = max(1, round(density * in_dim * out_dim))
        self.value = nn.Parameter(torch.zeros(num_modules, places))
        self.register_buffer("index", torch.arange(places).repeat(num_modules, 1))
        self.initialize(0, 0)

    def bind(self, frozen: nn.Module) -> None:
        if self.mask == "random":
            return
        if not isinstance(frozen, nn.Linear):
            raise ConfigError(
                "mask",
                "magnitude",
                f"reads the weight of a Linear, not of {type(frozen).__name__}",
                "use random",
            )
        size_N = frozen.weight.detach().t().abs().flatten()
        largest_n = (
            size_N.sort(descending=True, stable=True).indices[: self.index.shape[1]].sort().values
        )
        self.index.copy_(largest_n.expand_as(self.index))

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        return grouped_product(rows_RD, self.dense_deltas(), tokens_per_module)

    def dense_deltas(self) -> Tensor:
        """[e, D, O]: the modules as matrices."""
        flat = self.value.new_zeros(len(self.value), self.in_dim * self.out_dim).scatter(
            1, self.index, self.value
        )
        return flat.view(-1, self.in_dim, self.out_dim)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        out_O = [row_D.new_zeros(()) for _ in range(self.out_dim)]
        for place, value in zip(self.index[module].tolist(), self.value[module], strict=True):
            out_O[place % self.out_dim] = (
                out_O[place % self.out_dim] + row_D[place // self.out_dim] * value
            )
        return torch.stack(out_O)

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        with torch.no_grad():
            self.value[local].zero_()
        if self.mask == "random" and not self.index.is_meta:
            drawn_N = torch.randperm(
                self.in_dim * self.out_dim,
                generator=generator(seed, "module", layer, module, "index"),
            )
            self.index[local] = drawn_N[: self.index.shape[1]].sort().values

    def weight_delta(self, local: int) -> Tensor:
        return self.dense_deltas()[local].detach()

    def forward_averaged(self, weight_BM: Tensor, rows_RD: Tensor, tokens_per_module: int) -> Tensor:
        """The matrices are averaged: values at different places have no mean of their own."""
        matrix_BDO = torch.tensordot(weight_BM.to(self.value.dtype), self.dense_deltas(), dims=1)
        return grouped_product(rows_RD, matrix_BDO, tokens_per_module)


class LowRank(AdapterBank):
    """Args:
    rank: r.
    alpha: the product is scaled by alpha / r; default r, so that the scale is 1.
    """

    composition = "parameter"
    input_kind = "input"

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

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        return grouped_product(grouped_product(rows_RD, self.a, tokens_per_module), self.b, tokens_per_module) * self.scale

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        return self.scale * (row_D @ self.a[module] @ self.b[module])

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        normal_(self.a[local], 1 / math.sqrt(self.in_dim), seed, "module", layer, module, "a")
        with torch.no_grad():
            self.b[local].zero_()

    def weight_delta(self, local: int) -> Tensor:
        return (self.a[local] @ self.b[local]).detach() * self.scale
