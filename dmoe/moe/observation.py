"""What a layer can be asked to tell of one forward, beside its counts: tensors on the device, sums without a host read.

An observer is handed to the layers with the batch (`stats.ObservedContext`), so a step that nobody logs does not compute any of this.
What it finds is returned with the layer's stats and kept nowhere; a forward that is run again for backward counts nothing twice.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.balance.units import masked, normalized, real_tokens
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["MAXIMA", "SUMS", "decisions", "router_metrics"]

SUMS = ("made_K", "kept_K", "weight_K", "dropped_K", "entropy", "top1", "tokens")
"""What `router_state` returns that adds up over micro-batches and ranks."""
MAXIMA = ("logit_max",)
"""What it returns of which the largest counts."""


def router_metrics(chosen: Routing, limited: Routing, context: TokenContext) -> dict[str, Tensor]:
    """float64 vectors by name (a scalar has one element): how sure the router was, and what became of each choice.

    With p_t = the token's scores, normalised to sum 1, over real tokens:
    entropy = sum_t sum_e -p ln p (nats); top1 = sum_t max_e p; logit_max = the largest |logit| of any expert, noise included.
    By place k of a choice in its token's list: made_K and kept_K count it, weight_K and dropped_K sum the router's weights of it. A
    choice that was rerouted (`overflow: next_choice`) is kept. About fifteen small kernels over [T, E]; no collective.
    """
    made_TK = torch.ones_like(chosen.expert_TK, dtype=torch.bool) if chosen.keep_TK is None else chosen.keep_TK
    kept_TK = made_TK if limited.keep_TK is None else limited.keep_TK
    weight_TK = chosen.weight_TK.double().masked_fill(~made_TK, 0.0)
    share_TE = normalized(chosen.score_TE)
    sure_T2 = torch.stack([torch.special.entr(share_TE).sum(-1), share_TE.amax(-1)], dim=1)
    entropy, top1 = masked(sure_T2.double(), context.valid_T).sum(0).split(1)
    logit_TE = masked(chosen.logit_TE.abs(), context.valid_T)
    return {
        "made_K": made_TK.sum(0).double(),
        "kept_K": kept_TK.sum(0).double(),
        "weight_K": weight_TK.sum(0),
        "dropped_K": weight_TK.masked_fill(kept_TK, 0.0).sum(0),
        "entropy": entropy,
        "top1": top1,
        "tokens": real_tokens(chosen.score_TE, context.valid_T).double(),
        # A rank may have no tokens at all, and a maximum of nothing is an error.
        "logit_max": torch.cat([logit_TE.flatten(), logit_TE.new_zeros(1)]).amax().double().view(1),
    }


def decisions(chosen: Routing, limited: Routing, context: TokenContext) -> dict[str, Tensor]:
    """Each token's experts before any drop, `chosen_TE` (bool), and the first of them, `first_TE` (bool; all False for padding)."""
    made_TK = torch.ones_like(chosen.expert_TK, dtype=torch.bool) if chosen.keep_TK is None else chosen.keep_TK
    none_TE = torch.zeros_like(chosen.score_TE, dtype=torch.int64)
    first_T1, made_T1 = chosen.expert_TK[:, :1], made_TK[:, :1]
    return {
        "chosen_TE": none_TE.scatter_add(1, chosen.expert_TK, made_TK.long()) > 0,
        "first_TE": none_TE.scatter_add(1, first_T1, made_T1.long()) > 0,
    }
