"""Parameter composition: modules that add a low-rank or a sparse matrix to a frozen weight.

Letters: M modules, e modules on this rank, R rows, D input width, O output width, r rank,
n nonzero entries of a sparse module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.banks.base import AdapterBank, grouped_product
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.rng import generator, normal_


class LoRA(AdapterBank):
    """Low-rank modules (LoRA, Hu et al. 2021).

    y = x W + (alpha / r) * (x A_m) B_m

    A [M, D, r] is random and B [M, r, O] zero, so a new module changes nothing. A routed mixture of
    them is MoLoRA / LoRAMoE (Zadouri et al. 2023, Dou et al. 2023) with the frozen matrix as the
    shared expert. Cost: 2 r (D + O) FLOPs per row; under EP a row is sent with width D and returned
    with width O.
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
        """Create the bank.

        Args:
            num_modules: M.
            in_dim, out_dim: widths of the target module.
            rank: r.
            alpha: the product is scaled by alpha / r. None: r, so that the scale is 1.
        """
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
        hidden_Rr = grouped_product(rows_RD, self.a, tokens_per_module)
        return grouped_product(hidden_Rr, self.b, tokens_per_module) * self.scale

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        return self.scale * (row_D @ self.a[module] @ self.b[module])

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        normal_(self.a[local], 1 / math.sqrt(self.in_dim), seed, "module", layer, module, "a")
        with torch.no_grad():
            self.b[local].zero_()

    def weight_delta(self, local: int) -> Tensor:
        return (self.a[local] @ self.b[local]).detach() * self.scale


class SparseDelta(AdapterBank):
    """Sparse modules: a few numbers added to a frozen matrix, at fixed positions.

    y = x (W + S_m),     S_m zero except at n fixed positions: value [M, n], index [M, n]

    The positions are random (random masking, Xu and Zhang 2024), or where |W| is largest
    (magnitude, after Frankle and Carbin 2019; sparse fine-tuning, Ansell et al. 2022). Values are
    zero at the start. Cost: the e matrices of this rank are materialized in a forward, e * D * O
    numbers, and 2 D O FLOPs per row.
    """

    composition = "parameter"
    input_kind = "input"

    index: Tensor
    """int64 [M, n]: positions in the flattened [D, O], ascending."""

    def __init__(
        self,
        num_modules: int,
        in_dim: int,
        out_dim: int,
        *,
        density: float = 0.01,
        mask: str = "random",
    ) -> None:
        """Create the bank.

        Args:
            num_modules: M.
            in_dim, out_dim: widths of the target module.
            density: n / (D * O); n is at least 1.
            mask: `random`, different positions for each module, or `magnitude`, the same positions
                for all, read from the weight of the target Linear.
        """
        super().__init__(num_modules, in_dim, out_dim)
        if not 0 < density <= 1:
            raise ConfigError("density", density, "must be above 0 and at most 1", "use 0.01")
        if mask not in ("random", "magnitude"):
            raise ConfigError("mask", mask, "must be random or magnitude", "use random")
        self.mask = mask
        entries = max(1, round(density * in_dim * out_dim))
        self.value = nn.Parameter(torch.zeros(num_modules, entries))
        self.register_buffer("index", torch.arange(entries).repeat(num_modules, 1))
        self.initialize(0, 0)

    def bind(self, target: nn.Module) -> None:
        """Set the positions from the weight of the target, for `mask=magnitude`."""
        if self.mask == "random":
            return
        if not isinstance(target, nn.Linear):
            raise ConfigError(
                "mask",
                "magnitude",
                f"reads the weight of a Linear, not of {type(target).__name__}",
                "use random",
            )
        magnitude_N = target.weight.detach().t().abs().flatten()
        order_N = magnitude_N.sort(descending=True, stable=True).indices
        largest_n = order_N[: self.index.shape[1]].sort().values
        self.index.copy_(largest_n.expand_as(self.index))

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        return grouped_product(rows_RD, self.dense_deltas(), tokens_per_module)

    def dense_deltas(self) -> Tensor:
        """Return the modules as dense matrices, [e, D, O]."""
        flat = self.value.new_zeros(len(self.value), self.in_dim * self.out_dim)
        flat = flat.scatter(1, self.index, self.value)
        return flat.view(-1, self.in_dim, self.out_dim)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        out_O = [row_D.new_zeros(()) for _ in range(self.out_dim)]
        for position, value in zip(self.index[module].tolist(), self.value[module], strict=True):
            row, column = divmod(position, self.out_dim)
            out_O[column] = out_O[column] + row_D[row] * value
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

    def forward_averaged(
        self, weight_BM: Tensor, rows_RD: Tensor, tokens_per_module: int
    ) -> Tensor:
        """Average the matrices instead of the values, whose positions differ between modules."""
        matrix_BDO = torch.tensordot(weight_BM.to(self.value.dtype), self.dense_deltas(), dims=1)
        return grouped_product(rows_RD, matrix_BDO, tokens_per_module)
