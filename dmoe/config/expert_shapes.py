"""What an expert of given hidden widths is made of: its matrices, and so its weights and its work. Imports no torch.

    []          one linear map            D -> M
    [50]        one hidden layer          D -> 50 -> M
    [64, 32]    two                       D -> 64 -> 32 -> M

Between two matrices stands the activation `moe.experts.kind`; a gated one halves what it is given, so the matrix before it is twice
as wide. There are no biases: one row costs as many multiply-adds as the expert has weights.

Letters: D width in, M width out, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from dmoe.config.schema import ExpertsConfig, MoEConfig

GATED = frozenset({"swiglu", "geglu"})


def matrices(
    hidden: Sequence[int], dim: int, out_dim: int, kind: str
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each matrix of an expert, first to last."""
    wide = 2 if kind in GATED else 1
    widths_in, widths_out = [dim, *hidden], [*(wide * width for width in hidden), out_dim]
    return tuple(zip(widths_in, widths_out, strict=True))


def multiply_adds(hidden: Sequence[int], dim: int, out_dim: int, kind: str) -> int:
    """Of one row; it is the number of the expert's weights too."""
    return sum(rows * columns for rows, columns in matrices(hidden, dim, out_dim, kind))


def shapes_of(moe: MoEConfig) -> list[list[int]]:
    """Hidden widths of each expert, the uniform ones' included."""
    return moe.experts.shapes or [[moe.expert_dim]] * moe.num_experts


def zero_cost(experts: ExpertsConfig) -> int:
    """How many experts cost nothing; their ids come after the others'."""
    return experts.zero + experts.copy + experts.constant


def all_choices(moe: MoEConfig) -> int:
    """What a router chooses among: `moe.num_experts` and those that cost nothing."""
    return moe.num_experts + zero_cost(moe.experts)
