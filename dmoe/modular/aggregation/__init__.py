"""How the outputs of a token's modules become one, one way a file, behind the protocol of base.py."""

from __future__ import annotations

from dmoe.modular.aggregation.attention import Attention
from dmoe.modular.aggregation.base import Aggregation, Modules
from dmoe.modular.aggregation.linear import Concat, Gated, Mean, Stacked, WeightedSum
from dmoe.modular.aggregation.parameter_mean import ParameterMean

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "Attention",
    "Concat",
    "Gated",
    "Mean",
    "Modules",
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
