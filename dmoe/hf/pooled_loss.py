"""The auxiliary loss of transformers, for comparison: pooled over the layers, on this rank alone.

    E * sum_e f_e P_e        f_e: assignments of expert e in all layers / (L T), summing to K
                             P_e: mean of softmax(logits)_e over all layers and tokens

`load_balancing_loss_func` of transformers 5 (33 families). It differs from dmoe's `switch` in three
ways: it is K times as large; an imbalance of one layer can cancel another's; and it knows neither
the other ranks nor the bias of the choice (it chooses again, by softmax). dmoe's is the default.

Letters: T tokens, E experts, K experts per token, L MoE layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.hf.moefy import forward_of


def pooled_auxiliary_loss(model: nn.Module) -> Tensor:
    """Return transformers' auxiliary loss of the latest forward, unweighted, with gradient.

    Args:
        model: moefied, or in `dmoe.parallelize`. The loss is that of this rank's tokens.

    Raises:
        ConfigError: the model is not moefied, or has run no forward.
    """
    record = forward_of(model)
    if not record.layers:
        raise ConfigError("model", type(model).__name__, "has run no forward", "call it first")
    first = record.layers[0].routing
    count_E = torch.zeros_like(first.score_TE[0])
    probability_E, rows = count_E, count_E.new_zeros(())
    for layer in record.layers:
        score_TE = layer.routing.logit_TE.softmax(-1)
        top_TK = score_TE.topk(layer.routing.expert_TK.shape[1]).indices
        valid_T = record.context.valid_T
        if valid_T is None or len(valid_T) != len(score_TE):
            valid_T = torch.ones_like(score_TE[:, 0], dtype=torch.bool)
        valid_T1 = valid_T.to(score_TE.dtype).unsqueeze(1)
        chosen_TE = torch.zeros_like(score_TE).scatter(1, top_TK, 1.0)
        count_E = count_E + (chosen_TE * valid_T1).sum(0)
        probability_E = probability_E + (score_TE * valid_T1).sum(0)
        rows = rows + valid_T1.sum()
    return first.num_experts * (count_E / rows * (probability_E / rows)).sum()
