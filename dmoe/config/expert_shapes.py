"""Weight matrices of an expert of given hidden widths, and numbers of experts. Imports no torch.

    []          one linear map            D -> M
    [50]        one hidden layer          D -> 50 -> M
    [64, 32]    two                       D -> 64 -> 32 -> M

Between two matrices is the activation `moe.experts.kind`. A gated one halves its input, so the
matrix before it is twice as wide. There are no biases: the multiply-adds per row equal the number
of weights.

Letters: D input width, M output width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmoe.config.schema import ExpertsConfig, MoEConfig

GATED = frozenset({"swiglu", "geglu"})


def matrix_shapes(
    hidden: Sequence[int], dim: int, out_dim: int, kind: str
) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of each matrix of an expert, first to last.

    Args:
        hidden: its hidden widths.
        dim: input width D.
        out_dim: output width M.
        kind: the activation, `moe.experts.kind`.
    """
    factor = 2 if kind in GATED else 1
    widths_in, widths_out = [dim, *hidden], [*(factor * width for width in hidden), out_dim]
    return tuple(zip(widths_in, widths_out, strict=True))


def multiply_adds(hidden: Sequence[int], dim: int, out_dim: int, kind: str) -> int:
    """Return the multiply-adds per row, which is the number of weights too.

    Args: as for `matrix_shapes`.
    """
    return sum(rows * columns for rows, columns in matrix_shapes(hidden, dim, out_dim, kind))


def expert_shapes(moe: MoEConfig) -> list[list[int]]:
    """Return the hidden widths of each of the E routed experts, uniform or not."""
    return moe.experts.shapes or [[moe.expert_dim]] * moe.num_experts


def count_zero_cost(experts: ExpertsConfig) -> int:
    """Count the zero-cost experts; their ids follow those of the others."""
    return experts.zero + experts.copy + experts.constant


def count_choices(moe: MoEConfig) -> int:
    """Count the experts that a router chooses among: `moe.num_experts` and the zero-cost ones."""
    return moe.num_experts + count_zero_cost(moe.experts)
