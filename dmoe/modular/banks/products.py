"""`rows @ weight[module of the row]` for the narrow matrices that modules are made of: ranks, bottlenecks, single columns.

CUDA's grouped GEMM wants every row of a matrix to start at a multiple of 16 bytes. Experts are that wide anyway; a rank of 4 or a
column of ones is not, so there both widths are filled up with zeros to a multiple of 8, which changes no number. The CPU takes any
width.

Letters: R rows, I input width, O output width, e modules here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.experts.grouped import grouped_linear

__all__ = ["padded_product", "product", "spread"]

MULTIPLE = 8


def product(rows_RI: Tensor, weight_eIO: Tensor, per_module: TokensPerExpert) -> Tensor:
    """[R, O], in the rows' dtype."""
    weight_eIO = weight_eIO.to(rows_RI.dtype)
    function = padded_product if rows_RI.is_cuda else grouped_linear
    return function(rows_RI, weight_eIO, per_module)


def padded_product(rows_RI: Tensor, weight_eIO: Tensor, per_module: TokensPerExpert) -> Tensor:
    """The same, through matrices whose widths are multiples of 8. Costs a copy of what is not."""
    more_in, more_out = (-size % MULTIPLE for size in weight_eIO.shape[1:])
    if not more_in and not more_out:
        return grouped_linear(rows_RI, weight_eIO, per_module)
    wide_RO = grouped_linear(F.pad(rows_RI, (0, more_in)), F.pad(weight_eIO, (0, more_out, 0, more_in)), per_module)
    return wide_RO[:, : weight_eIO.shape[2]]


def spread(stack_eX: Tensor, rows_RD: Tensor, per_module: TokensPerExpert) -> Tensor:
    """[R, X]: each row's module's vector. As a product with a one, so that its backward is a product too and no atomic scatter."""
    return product(rows_RD.new_ones(len(rows_RD), 1), stack_eX.unsqueeze(1), per_module)
