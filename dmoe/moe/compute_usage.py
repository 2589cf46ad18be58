"""Compute used by one forward: experts used, cost per token, and an explanation per token in words.

Everything is computed on request from the routing that the layer returns; a forward pays nothing.

Letters: T tokens, E experts (zero-cost ones included), K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import RouterConfig
from dmoe.moe.routing import DispatchPlan, Routing


@dataclass(frozen=True)
class ComputeUsage:
    """Compute used by the tokens of one forward."""

    routing: Routing
    """The router's decision."""
    plan: DispatchPlan
    """The assignments computed after capacity."""
    cost_E: tuple[float, ...]
    """Multiply-adds per row with each expert, as a share of those of all experts."""
    names_E: tuple[str, ...]
    router: RouterConfig
    budget: float | None
    """Share a token may spend. None: the router has no budget."""
    bias_E: Tensor | None = None
    """A budget router's bias in this forward: it tries the experts in the order score + bias."""

    @property
    def usage_E(self) -> Tensor:
        """float64 [E]: rows each expert computed, divided by the number of tokens."""
        rows_E = torch.zeros(
            len(self.cost_E), dtype=torch.float64, device=self.plan.expert_TK.device
        )
        rows_E.scatter_add_(
            0, self.plan.expert_TK.flatten(), self.plan.is_kept_TK.flatten().double()
        )
        return rows_E / max(1, len(self.plan.expert_TK))

    @property
    def cost_T(self) -> Tensor:
        """float64 [T]: cost of each token, as a share of the cost of all experts."""
        cost_E = torch.tensor(self.cost_E, dtype=torch.float64, device=self.plan.expert_TK.device)
        return (cost_E[self.plan.expert_TK] * self.plan.is_kept_TK).sum(1)

    def of_token(self, token: int) -> str:
        """Explain the decision for one token, expert by expert. Reads values on the host."""
        left, parts = 1.0 if self.budget is None else self.budget, list[str]()
        experts, keep = self.plan.expert_TK[token].tolist(), self.plan.is_kept_TK[token].tolist()
        kept = {expert for expert, is_kept in zip(experts, keep, strict=True) if is_kept}
        for expert, selected, score in self._considered(token):
            cost = self.cost_E[expert]
            subject = f"{self.names_E[expert]} (weight {score:.3f}, cost {cost:.3f})"
            if selected:
                left -= cost
                outcome = "taken" if expert in kept else "dropped: no slot was left"
                parts.append(f"{subject} {outcome}")
            else:
                parts.append(f"{subject} {self._reason(score, cost, left)}")
        rerouted = sorted(kept - set(self.routing.expert_TK[token].tolist()))
        parts += [f"{self.names_E[expert]} taken instead" for expert in rerouted]
        spent = float(self.cost_T[token])
        return f"token {token}: {'; '.join(parts)}. Spent {spent:.3f}{self._limit}."

    def __str__(self) -> str:
        """Summarize the whole forward in one line."""
        used = ", ".join(
            f"{name} {share:.3f}"
            for name, share in zip(self.names_E, self.usage_E.tolist(), strict=True)
        )
        mean = float(self.cost_T.mean()) if len(self.cost_T) else 0.0
        return (
            f"rows per token: {used}. Spent {mean:.3f}{self._limit} of the cost of all experts, "
            "on average."
        )

    @property
    def _limit(self) -> str:
        return "" if self.budget is None else f" of {self.budget:.3f}"

    @property
    def _has_budget(self) -> bool:
        return router_spec(self.router.kind).has_budget

    def _considered(self, token: int) -> list[tuple[int, bool, float]]:
        """List a token's experts in the order of consideration: (expert, selected, score)."""
        score_E = self.routing.score_TE[token].detach()
        order_E = (score_E if self.bias_E is None else score_E + self.bias_E).tolist()
        listed = zip(
            self.routing.expert_TK[token].tolist(),
            self.routing.is_selected_TK[token].tolist(),
            strict=True,
        )
        considered = [(expert, selected, float(score_E[expert])) for expert, selected in listed]
        if not self._has_budget:
            return considered
        return sorted(considered, key=lambda row: (-order_E[row[0]], row[0]))

    def _reason(self, score: float, cost: float, left: float) -> str:
        """Explain why an expert was not selected."""
        if self._has_budget and score <= self.router.min_weight:
            return f"left out: its weight is not above {self.router.min_weight:g}"
        if self._has_budget and cost > left:
            return f"left out: only {max(0.0, left):.3f} of the budget was left"
        return "left out"
