"""How the outputs of a token's modules become one, one way a file, behind the protocol of base.py."""

from __future__ import annotations

from dmoe.modular.aggregation.base import Aggregation, DispatchedModules
from dmoe.modular.aggregation.fixed import Mean, ParameterMean, Stacked, WeightedSum
from dmoe.modular.aggregation.learned import Attention, Concat, Gated

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "Attention",
    "Concat",
    "Gated",
    "Mean",
    "DispatchedModules",
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
"""Each is made as `kind(width, query, top_k)`."""
