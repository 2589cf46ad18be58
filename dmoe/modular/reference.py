"""The layer of modules, one token at a time and obviously right. For tests."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.modular.aggregation.base import Choice, kept
from dmoe.modular.aggregation.parameter_mean import ParameterMean, sequence_weights
from dmoe.modular.layer import Modular
from dmoe.moe.routing import Routing


def contribution_reference(
    layer: Modular, rows_TD: Tensor, seen_TQ: Tensor, routing: Routing, sequences: int
) -> Tensor:
    """[T, W]: what `layer.aggregation` returns, given the routing."""
    each = len(rows_TD) // sequences
    totals = []
    for t in range(len(rows_TD)):
        choices = [
            Choice(k, int(routing.expert_TK[t, k]), routing.weight_TK[t, k])
            for k in range(routing.expert_TK.shape[1])
            if bool(kept(routing)[t, k])
        ]
        if isinstance(layer.aggregation, ParameterMean):
            weight_BM = sequence_weights(routing, sequences, layer.experts.num_modules)
            choices = (
                [Choice(0, m, weight) for m, weight in enumerate(weight_BM[t // each])]
                if choices
                else []
            )
        if choices:
            totals.append(layer.aggregation.one(layer.experts, rows_TD[t], seen_TQ[t], choices))
        else:
            totals.append(rows_TD.new_zeros(layer.experts.width))
    return torch.stack(totals)
