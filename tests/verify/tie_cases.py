"""Two experts that every token likes equally, and ranks that do not quite agree: a tie, made to order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.moe.routers.base import LearnedRouter

__all__ = ["nudged", "pushed", "twins"]


def twins() -> None:
    """Rows 0 and 1 of every router are the same at the start."""
    initialize = LearnedRouter.initialize

    def initialize_twins(self: Any, *args: Any) -> None:
        initialize(self, *args)
        with torch.no_grad():
            self.weight[1] = self.weight[0]

    LearnedRouter.initialize = initialize_twins  # type: ignore[method-assign]


def nudged() -> None:
    """Expert 1's logits three units in the last place larger than they are."""
    scale_second_expert(1 + 3 * 2**-23)


def pushed() -> None:
    """Expert 1's logits a thousandth larger than they are."""
    scale_second_expert(1.001)


def scale_second_expert(factor: float) -> None:
    logits = LearnedRouter.logits

    def scaled(self: Any, *args: Any) -> Tensor:
        logit_TE = logits(self, *args)
        factor_E = torch.ones_like(logit_TE[0])
        factor_E[1] = factor
        return logit_TE * factor_E

    LearnedRouter.logits = scaled  # type: ignore[method-assign]
