"""The auxiliary loss of transformers (`balance.pooled`): pooled over the layers, per rank.

    E * sum_e f_e P_e        f_e: assignments of expert e in all layers / (L T), summing to K
                             P_e: mean of softmax(logits)_e over all layers and tokens

`load_balancing_loss_func` of transformers 5 (33 families). It differs from dmoe's `switch` in three
ways: it is K times as large; an imbalance of one layer can cancel another's; and it knows neither
the other ranks nor the bias of the choice (it chooses again, by softmax). dmoe's is the default.
The loss of a run is the mean over micro-batches, as plain DDP would average it.

Cost: no collective; with a mask of padding, one all-reduce of an int64.

Letters: T tokens, E experts, K experts per token, L MoE layers, U units (micro-batches of virtual
ranks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.hf.layer import Forward, MoefiedLayer
from dmoe.moe.load_balancing.losses import num_real_units


def pooled_auxiliary_loss(model: nn.Module) -> Tensor:
    """Return transformers' auxiliary loss of the latest forward, unweighted, with gradient.

    Args:
        model: moefied, or in `dmoe.parallelize`. The loss is that of this rank's tokens.

    Raises:
        ConfigError: the model is not moefied, or has run no forward.
    """
    from dmoe.hf.moefy import forward_of

    record = forward_of(model)
    if not record.layers:
        raise ConfigError("model", type(model).__name__, "has run no forward", "call it first")
    return pooled_losses(record, 1)[0]


def add_pooled(layers: Sequence[MoefiedLayer], record: Forward) -> None:
    """Add this rank's share of `balance.pooled` to the losses of a forward, 1/L to each layer.

    Nothing to do without a coefficient, or if the forward has failed.
    """
    first = layers[0]
    if not first.balance.pooled or len(record.layers) != len(layers):
        return
    units, valid_T = first.virtual_ranks, _valid(record)
    loss_U = pooled_losses(record, units)
    count = units * first.comm.size
    share = loss_U.sum() / count
    if valid_T is not None:
        share = loss_U.sum() / first.comm.sum(num_real_units(valid_T, units)).clamp(min=1)
    for layer in record.layers:
        layer.aux["pooled"] = share * (first.comm.size if first.comm.averages else 1) / len(layers)


def pooled_losses(record: Forward, units: int) -> Tensor:
    """Return transformers' loss of each of `units` equal runs of tokens, [U]."""
    first, valid_T = record.layers[0].routing, _valid(record)
    experts = first.num_experts
    count_UE = first.logit_TE.new_zeros(units, experts)
    probability_UE, rows_U1 = count_UE, first.logit_TE.new_zeros(units, 1)
    # sizes are explicit: -1 has no meaning for zero tokens
    tokens = len(first.logit_TE) // max(1, units)
    for layer in record.layers:
        score_TE = layer.routing.logit_TE.softmax(-1)
        top_TK = score_TE.topk(layer.routing.expert_TK.shape[1]).indices
        weight_T1 = torch.ones_like(score_TE[:, :1])
        if valid_T is not None:
            weight_T1 = valid_T.to(score_TE.dtype).unsqueeze(1)
        chosen_TE = torch.zeros_like(score_TE).scatter(1, top_TK, 1.0)
        count_UE = count_UE + (chosen_TE * weight_T1).view(units, tokens, experts).sum(1)
        probability_UE = probability_UE + (score_TE * weight_T1).view(units, tokens, experts).sum(1)
        rows_U1 = rows_U1 + weight_T1.view(units, tokens, 1).sum(1)
    rows_U1 = rows_U1.clamp(min=1)
    return experts * (count_UE / rows_U1 * (probability_UE / rows_U1)).sum(-1)


def _valid(record: Forward) -> Tensor | None:
    valid_T = record.context.valid_T
    tokens = len(record.layers[0].routing.expert_TK)
    return valid_T if valid_T is not None and len(valid_T) == tokens else None
