"""Aggregations: how the outputs of a token's modules are combined."""

from __future__ import annotations

from dmoe.modular.aggregation.base import Aggregation, DispatchedModules
from dmoe.modular.aggregation.fixed import Mean, ParameterMean, Stacked, WeightedSum
from dmoe.modular.aggregation.learned import Attention, Concat, Gated

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "Attention",
    "Concat",
    "DispatchedModules",
    "Gated",
    "Mean",
    "ParameterMean",
    "Stacked",
    "WeightedSum",
]

AGGREGATIONS: dict[str, type[Aggregation]] = {
    "weighted_sum": WeightedSum,
    "mean": Mean,
    "concat": Concat,
    "attention": Attention,
    "gated": Gated,
    "parameter_mean": ParameterMean,
    "stacked": Stacked,
}
"""Aggregation classes by config name, constructed as `kind(width, router_dim, top_k)`."""
