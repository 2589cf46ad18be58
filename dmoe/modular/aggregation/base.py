"""How the outputs of a token's modules become one: the protocol.

An aggregation is handed the modules as two questions. `mix` is the weighted sum that the dispatcher's combine computes; `slots` brings
each choice's output home by itself, which costs T * K * W numbers of memory and no further bytes on the wire.

Letters: T tokens (sequences, for prompts), K modules a token, D width of a row, W width of a contribution, Q width of what routers see.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import Routing


class ModuleChoice(NamedTuple):
    """One choice that a token made."""

    position: int
    """k: which of its K choices it is."""
    module: int
    weight: Tensor


class DispatchedModules(Protocol):
    """The bank behind its dispatcher: where the modules are is not the aggregation's business."""

    @property
    def experts(self) -> AdapterBank: ...

    def dispatch_and_combine(self, rows_TD: Tensor, routing: Routing) -> Tensor:
        """[T, W]: the sum over a token's kept choices of weight times output. One dispatch and one combine."""
        ...

    def per_choice_outputs(self, rows_TD: Tensor, routing: Routing) -> Tensor:
        """[T, K, W]: the output of each choice, unweighted; zero where it was not kept. One dispatch and one combine."""
        ...


class Aggregation(nn.Module):
    """Made for the width W of a contribution, the width Q of what the router sees, and K. Its parameters are trained with the modules.

    `per_choice` says that parameters belong to the K places, so that K cannot change afterwards.
    """

    per_choice = False
    uses_weights = True
    """Whether the router's weights enter; else they only choose, and a learned router would get no gradient."""
    sequential = False
    """Whether each module reads what the one before it made: only for modules that read and write one width."""

    def __init__(self, width: int, router_dim: int, top_k: int) -> None:
        super().__init__()
        self.width, self.router_dim, self.top_k = width, router_dim, top_k

    def initialize(self, seed: int, layer: int) -> None:
        """Draw the weights anew; most aggregations have none."""

    def forward(
        self, modules: DispatchedModules, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
    ) -> Tensor:
        """[T, W]: the contribution of the modules together."""
        raise NotImplementedError

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        """[W]: the formula for one token and the choices it made. The naive reference, for tests."""
        raise NotImplementedError


def keep_mask(routing: Routing) -> Tensor:
    """bool [T, K]: which choices were made."""
    return (
        torch.ones_like(routing.expert_TK, dtype=torch.bool)
        if routing.keep_TK is None
        else routing.keep_TK
    )
