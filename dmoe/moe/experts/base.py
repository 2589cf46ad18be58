"""The base class of routed experts: rows in, rows out, and the cost of a row.

Letters: R rows, D input width, M output width, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from dmoe.moe.interfaces import TokensPerExpert, depth_of
from dmoe.moe.placement import ExpertPlacement

FORWARD_TAKES = ("takes_chunks", "takes_copies", "takes_order", "takes_tokens", "sends_gradient")
"""What a `forward` may take besides rows and rows per expert: attributes of `Experts`."""


class Experts(nn.Module):
    """The routed experts of a layer: all E, until `shard` keeps those of one rank.

    `matrices`: (rows, columns) of the matrices of every expert of all ranks, first to last.
    """

    kernels = "torch"
    """`moe.kernels`; kinds that know no other compute with torch's."""
    takes_chunks = False
    """Whether `forward` takes `chunks.RowChunks`, and returns what has departed of each."""
    takes_copies = False
    """Whether `forward` takes `RowsWithCopies`."""
    takes_order = False
    """Whether `forward` takes rows in any order and, by name, `order_R`, on the CPU."""
    takes_tokens = False
    """Whether `forward` takes tokens and a `TokenRows` on the CPU, and returns their sums."""
    sends_gradient = False
    """Whether `forward` takes a function that sends the rows' gradient back."""

    def __init_subclass__(cls) -> None:
        """Take no more than the arguments of this class's own `forward`, unless it says so."""
        super().__init_subclass__()
        for name in FORWARD_TAKES:
            if depth_of(cls, "forward") < depth_of(cls, name):
                setattr(cls, name, False)

    def __init__(self, kind: str, matrices: tuple[tuple[tuple[int, int], ...], ...]) -> None:
        super().__init__()
        self.kind, self.matrices, self.num_experts = kind, matrices, len(matrices)

    @property
    def multiply_adds(self) -> tuple[int, ...]:
        """Multiply-adds of one row with each expert; also its number of weights (no biases)."""
        return tuple(sum(rows * columns for rows, columns in shapes) for shapes in self.matrices)

    @property
    def flops(self) -> tuple[int, ...]:
        """Forward FLOPs per row with each expert, two per multiply-add; backward takes twice."""
        return tuple(2 * number for number in self.multiply_adds)

    @property
    def cost(self) -> tuple[float, ...]:
        """Multiply-adds of each expert as a share of those of all experts; they sum to 1."""
        total = sum(self.multiply_adds)
        return tuple(number / total for number in self.multiply_adds)

    def forward(self, rows_RD: Tensor, tokens_per_expert: TokensPerExpert) -> Tensor:
        """Compute rows_RM of rows grouped by this rank's physical experts."""
        raise NotImplementedError

    def placement(self, ranks: int) -> ExpertPlacement:
        """Return the placement of the experts on `ranks` ranks."""
        raise NotImplementedError

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        """Keep only the experts of one rank."""
        raise NotImplementedError

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Draw the weights, each expert's from its own generator: the same weights at any EP size.

        Args:
            seed: seed of the run.
            layer: index among the MoE layers.
            std: standard deviation of all matrices but the last.
            out_std: standard deviation of the last matrix.
        """
        raise NotImplementedError
