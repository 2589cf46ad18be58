"""The interface of aggregations.

An aggregation gets the modules behind two operations. `dispatch_and_combine` is the weighted sum
that a dispatcher's combine computes. `per_choice_outputs` returns the output of each choice, which
costs T * K * W numbers of memory and no further bytes in the all-to-all.

Letters: T tokens (sequences, for prompts), K modules per token, D row width, W width of a module's
output, Q width of the router's input.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor, nn

from dmoe.modular.banks.base import AdapterBank
from dmoe.moe.routing import DispatchPlan


class ModuleChoice(NamedTuple):
    """One choice of a token."""

    position: int
    """Index k among the token's K choices."""
    module: int
    weight: Tensor


class DispatchedModules(Protocol):
    """A bank behind its dispatcher: its modules may be on other ranks."""

    @property
    def experts(self) -> AdapterBank: ...

    def dispatch_and_combine(self, rows_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return [T, W], per token the sum over its kept choices of weight times output.

        One dispatch and one combine.
        """
        ...

    def per_choice_outputs(self, rows_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Return [T, K, W], the output of each choice, unweighted; zero where it is not kept.

        One dispatch and one combine.
        """
        ...


class Aggregation(nn.Module):
    """Combines the outputs of a token's modules. Its parameters are trained with the modules."""

    per_choice = False
    """True if it has parameters for each of the K choices, so that K cannot change."""
    uses_weights = True
    """False if it ignores the router's weights: a learned router would get no gradient."""
    sequential = False
    """True if each module reads the output of the one before: input and output width are equal."""

    def __init__(self, width: int, router_dim: int, top_k: int) -> None:
        """Create it for output width W, router input width Q, and K choices."""
        super().__init__()
        self.width, self.router_dim, self.top_k = width, router_dim, top_k

    def initialize(self, seed: int, layer: int) -> None:
        """Initialize the parameters; most aggregations have none."""

    def forward(
        self,
        modules: DispatchedModules,
        rows_TD: Tensor,
        router_input_TQ: Tensor,
        plan: DispatchPlan,
        sequences: int,
    ) -> Tensor:
        """Combine the modules' outputs.

        Args:
            modules: the bank behind its dispatcher.
            rows_TD: rows of the modules.
            router_input_TQ: input of the router.
            plan: modules and weights of each token.
            sequences: number of equal sequences that the T tokens form.

        Returns:
            The contribution [T, W].
        """
        raise NotImplementedError

    def reference(
        self, bank: AdapterBank, row_D: Tensor, router_input_Q: Tensor, choices: list[ModuleChoice]
    ) -> Tensor:
        """Combine the outputs for one token by the formula.

        Args:
            bank: all modules.
            row_D: the token's row.
            router_input_Q: the token's router input.
            choices: its kept choices.

        Returns:
            The contribution [W].
        """
        raise NotImplementedError
