"""What every kind of routed expert is: rows in, rows out, and what a row costs.

Letters: R rows, D width in, M width out, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.placement import ExpertPlacement


class Experts(nn.Module):
    """The routed experts of a layer: of all E, until `keep` leaves those of one rank.

    `matrices`: rows and columns of the matrices of every expert of all ranks, first to last.
    """

    def __init__(self, kind: str, matrices: tuple[tuple[tuple[int, int], ...], ...]) -> None:
        super().__init__()
        self.kind, self.matrices, self.num_experts = kind, matrices, len(matrices)

    @property
    def multiply_adds(self) -> tuple[int, ...]:
        """Of one row with each expert, which is the number of its weights too: there are no biases."""
        return tuple(sum(rows * columns for rows, columns in one) for one in self.matrices)

    @property
    def flops(self) -> tuple[int, ...]:
        """Forward FLOPs of one row with each expert, two for each multiply-add; backward takes twice as many."""
        return tuple(2 * number for number in self.multiply_adds)

    @property
    def cost(self) -> tuple[float, ...]:
        """Each expert's multiply-adds a row as a share of those of all experts together: they sum to 1."""
        total = sum(self.multiply_adds)
        return tuple(number / total for number in self.multiply_adds)

    def forward(self, rows_RD: Tensor, per_expert: TokensPerExpert) -> Tensor:
        """rows_RM of rows that stand in the order of this rank's places."""
        raise NotImplementedError

    def placement(self, ranks: int) -> ExpertPlacement:
        """Which of so many ranks would have which experts."""
        raise NotImplementedError

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        """Keep only the experts of one rank."""
        raise NotImplementedError

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Draw the weights anew, each expert's from a generator of its own: the same weights at any EP size."""
        raise NotImplementedError
