"""How the outputs of a token's modules become one, one way a file, behind the protocol of base.py."""

from __future__ import annotations

from dmoe.modular.aggregation.attention import Attention
from dmoe.modular.aggregation.base import Aggregation, Modules
from dmoe.modular.aggregation.concat import Concat
from dmoe.modular.aggregation.gated import Gated
from dmoe.modular.aggregation.mean import Mean
from dmoe.modular.aggregation.parameter_mean import ParameterMean
from dmoe.modular.aggregation.stacked import Stacked
from dmoe.modular.aggregation.weighted_sum import WeightedSum

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
