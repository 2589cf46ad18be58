"""What a `train` line says of the modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from dmoe.modular import layers
from dmoe.training.totals import ReducedStep

__all__ = ["module_lines"]


def module_lines(model: nn.Module, totals: ReducedStep) -> dict[str, Any]:
    """`modules`: for each place how often each module was chosen, and the losses of its router. Empty without modules."""
    if not totals.modules:
        return {}
    told = zip(layers(model), totals.modules, strict=True)
    return {
        "modules": [
            {"place": place, "load": seen.choices, "load_max_over_mean": seen.load_max_over_mean, "aux": seen.aux}
            for place, seen in told
        ]
    }
