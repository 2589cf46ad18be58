"""What a layer did with its compute: which experts were used, what each token spent, and why, in words.

Everything is computed when it is asked for, from the routing the layer returns; a forward that nobody asks pays nothing.

Letters: T tokens, E experts with those of zero cost, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.routing import Routing


@dataclass(frozen=True)
class ComputeUsage:
    chosen: Routing
    """The router's decision."""
    limited: Routing
    """What the capacity left of it."""
    cost_E: tuple[float, ...]
    """Multiply-adds of a row with each expert as a share of those of all; 0 for zero-cost ones."""
    names_E: tuple[str, ...]
    router: RouterConfig
    budget: float | None
    """Share a token might spend; None for routers that know none."""
    bias_E: Tensor | None = None
    """The router's bias, of the moment: with the score it says in which order experts were asked."""

    @property
    def usage_E(self) -> Tensor:
        """float64 [E]: rows each expert computed, over the number of tokens."""
        rows_E = torch.zeros(
            len(self.cost_E), dtype=torch.float64, device=self.limited.expert_TK.device
        )
        expert_N = self.limited.expert_TK.flatten()
        rows_E.scatter_add_(0, expert_N, self._kept_TK.flatten().double())
        return rows_E / max(1, len(self.limited.expert_TK))

    @property
    def cost_T(self) -> Tensor:
        """float64 [T]: what each token spent."""
        cost_E = torch.tensor(
            self.cost_E, dtype=torch.float64, device=self.limited.expert_TK.device
        )
        return (cost_E[self.limited.expert_TK] * self._kept_TK).sum(1)

    def of_token(self, token: int) -> str:
        """The decision for one token, expert by expert as they were asked. Reads the values back."""
        left, said = 1.0 if self.budget is None else self.budget, []
        kept = {
            e
            for e, kept in zip(
                self.limited.expert_TK[token].tolist(), self._kept_TK[token].tolist(), strict=True
            )
            if kept
        }
        for expert, made, score in self._asked(token):
            cost = self.cost_E[expert]
            what = f"{self.names_E[expert]} (weight {score:.3f}, cost {cost:.3f})"
            if made:
                left -= cost
                said.append(
                    f"{what} taken" if expert in kept else f"{what} dropped: no slot was left"
                )
            else:
                said.append(f"{what} {self._why_not(score, cost, left)}")
        moved = [self.names_E[e] for e in sorted(kept - set(self.chosen.expert_TK[token].tolist()))]
        said += [f"{name} taken instead" for name in moved]
        limit = "" if self.budget is None else f" of {self.budget:.3f}"
        return f"token {token}: {'; '.join(said)}. Spent {float(self.cost_T[token]):.3f}{limit}."

    def __str__(self) -> str:
        """The whole forward in a line."""
        used = ", ".join(
            f"{name} {share:.3f}"
            for name, share in zip(self.names_E, self.usage_E.tolist(), strict=True)
        )
        mean = float(self.cost_T.mean()) if len(self.cost_T) else 0.0
        limit = "" if self.budget is None else f" of {self.budget:.3f}"
        return (
            f"rows a token: {used}. Spent {mean:.3f}{limit} of the cost of all experts, on average."
        )

    def _asked(self, token: int) -> list[tuple[int, bool, float]]:
        """Each expert of a token's list, whether it was taken, and its score, in the order they were asked."""
        score_E = self.chosen.score_TE[token].detach()
        rank_E = (score_E if self.bias_E is None else score_E + self.bias_E).tolist()
        listed = zip(
            self.chosen.expert_TK[token].tolist(), _all_or(self.chosen)[token].tolist(), strict=True
        )
        asked = [(expert, made, float(score_E[expert])) for expert, made in listed]
        return (
            sorted(asked, key=lambda one: (-rank_E[one[0]], one[0]))
            if self.router.kind == "budget"
            else asked
        )

    @property
    def _kept_TK(self) -> Tensor:
        return _all_or(self.limited)

    def _why_not(self, score: float, cost: float, left: float) -> str:
        if self.router.kind == "budget" and score <= self.router.min_weight:
            return f"left out: its weight is not above {self.router.min_weight:g}"
        if self.router.kind == "budget" and cost > left:
            return f"left out: only {max(0.0, left):.3f} of the budget was left"
        return "left out"


def _all_or(routing: Routing) -> Tensor:
    return (
        torch.ones_like(routing.expert_TK, dtype=torch.bool)
        if routing.keep_TK is None
        else routing.keep_TK
    )
