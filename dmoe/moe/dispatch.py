"""Carrying tokens to experts and back: the protocol, and the two dispatchers that need no communication.

The layer does not know where experts live. Here all of them are local; `distributed/all_to_all.py` wraps these same two with an
all-to-all, so that what is sorted, dropped and summed is one piece of code on one process and on a thousand GPUs.

Letters: T tokens, D width, E experts, e experts here (E/EP), K experts a token, R rows, G groups, C slots of one (group, expert).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from dmoe.moe.permute import unpermute, permute, packed_permutation, padded_permutation
from dmoe.moe.routing import Routing

__all__ = ["Dispatcher", "PackedLocal", "PaddedLocal", "TokensPerExpert"]

TokensPerExpert = Tensor | int
"""Rows of each local expert: an int64 tensor [e], or one number where all have equally many (padded slots: no host read)."""


class Dispatcher(Protocol):
    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, TokensPerExpert, Any]:
        """rows_RD grouped by local expert, how many each has, and a ticket that `combine` takes back."""
        ...

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        """y_TD, the weighted sum over each token's kept choices, at the rank the tokens came from."""
        ...


class PackedLocal:
    """Exactly the rows there are. Dropless costs no host sync; with drops or padding, one (the number of rows)."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, TokensPerExpert, Any]:
        placement, count_E = packed_permutation(routing)
        if routing.keep_TK is not None:
            placement = placement.first_rows(int(count_E.sum()))
        return permute(x_TD, placement), count_E, placement

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        return unpermute(rows_RD, weight_TK, metadata)


class PaddedLocal:
    """Exactly G*C rows an expert, empty slots zero: every shape is known from the config. No host sync."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, TokensPerExpert, Any]:
        placement = padded_permutation(routing)
        assert routing.capacity is not None
        return permute(x_TD, placement), routing.groups * routing.capacity, placement

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        return unpermute(rows_RD, weight_TK, metadata)
