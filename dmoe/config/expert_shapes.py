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

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label, parse
from dmoe.config.schema import ExpertsConfig, MoEConfig

MAX_WIDTH, MAX_DEPTH = 1 << 24, 100
"""Width, and number of hidden layers, of an expert."""
GATED = frozenset({"swiglu", "geglu"})


def dense_kind(experts: ExpertsConfig) -> str:
    """Return the activation of dense and shared feed-forwards: swiglu beside own experts."""
    return "swiglu" if parse(experts.kind) is not None else experts.kind


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


def check_shapes(experts: ExpertsConfig, num_experts: int) -> None:
    """Refuse shapes that are not those of `num_experts` experts.

    Raises:
        ConfigError: another number of shapes, or a width out of range.
    """
    if not experts.shapes:
        return
    if parse(experts.kind) is not None:
        allowed = f"are not for experts of one's own, {label(experts.kind)}"
        raise ConfigError("moe.experts.shapes", experts.shapes, allowed, "use moe.experts.options")
    if len(experts.shapes) != num_experts:
        allowed = f"must be the number of moe.experts.shapes, {len(experts.shapes)}"
        raise ConfigError("moe.num_experts", num_experts, allowed, f"use {len(experts.shapes)}")
    for shape in experts.shapes:
        if len(shape) > MAX_DEPTH or any(not 1 <= width <= MAX_WIDTH for width in shape):
            allowed = (
                f"holds {shape}: hidden widths are from 1 to {MAX_WIDTH}, at most {MAX_DEPTH} of "
                "an expert"
            )
            fix = "write [] for one linear map"
            raise ConfigError("moe.experts.shapes", experts.shapes, allowed, fix)
