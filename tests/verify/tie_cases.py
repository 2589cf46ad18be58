"""Setups and patches that make ties: two experts with equal scores, and logits scaled on ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.moe.routers.base import LearnedRouter


def equal_experts() -> None:
    """Initialize rows 0 and 1 of every router alike."""
    initialize = LearnedRouter.initialize

    def initialize_equal(self: Any, *args: Any) -> None:
        initialize(self, *args)
        with torch.no_grad():
            self.weight[1] = self.weight[0]

    LearnedRouter.initialize = initialize_equal  # type: ignore[method-assign]


def shift_by_rounding() -> None:
    """Increase the logits of expert 1 by three units in the last place."""
    scale_second_expert(1 + 3 * 2**-23)


def shift_beyond_rounding() -> None:
    """Increase the logits of expert 1 by a thousandth."""
    scale_second_expert(1.001)


def scale_second_expert(factor: float) -> None:
    logits = LearnedRouter.logits

    def scaled(self: Any, *args: Any) -> Tensor:
        logit_TE = logits(self, *args)
        factor_E = torch.ones_like(logit_TE[0])
        factor_E[1] = factor
        return logit_TE * factor_E

    LearnedRouter.logits = scaled  # type: ignore[method-assign]
