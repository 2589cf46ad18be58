"""Routers without parameters: K experts of equal weight, by label or by hash.

`score` is 1/K for the selected experts and 0 elsewhere, so P_e = f_e and the Switch loss E * sum_e
f_e P_e becomes E * sum_e f_e^2: a measure of the imbalance, 1 at perfect balance, without gradient.
All logits are -ln E, so that logsumexp, which the router z-loss would shrink, is already 0.
Load-balancing losses of such a router are reported and train nothing.

Fixed (as in DEMix, Gururangan et al. 2022): the experts follow from a label of the batch (task,
language, domain).

    experts of a token = (label * K + k) mod E,  k = 0 .. K-1;      weights 1/K, scaled

With E = K * labels every label has K experts of its own. Cost: K integers per token.

Hash (Roller et al. 2021, "Hash Layers"): the experts follow from the token id alone.

    h_k = mix(mix(token id) + k + 64 * layer) mod (E - k),   k = 0 .. K-1
    the k-th expert is the h_k-th of those, in order of their ids, that this token has not taken yet

so a token has K distinct experts, each set of K about equally often, and another set in every layer
(the same set in all layers would send the same tokens through the same chain of experts). Frequent
tokens make frequent experts: the load is as uneven as the text. `mix` is a 32-bit finalizer
(Wellons 2018, "lowbias32"), in int64 arithmetic that never leaves 63 bits, so CPU and CUDA agree
exactly. Cost: O(K^2) integer operations per token.

No collective, no host sync.

Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.inputs import per_token_input
from dmoe.moe.routers.base import RouterModule, valid_choices
from dmoe.moe.routers.projection import router_dtype
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext

MASK = 0xFFFFFFFF
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
LAYER_STRIDE = 64
"""Separates the layers' keys; two layers could share a key only if K were larger."""


class StaticRouter(RouterModule):
    """A router without parameters; `dim` is unused, so that all kinds are built alike."""

    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        super().__init__(config, num_experts, top_k, layer)


class FixedRouter(StaticRouter):
    """Selects the experts that belong to the token's label."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        """Raise ValueError without `context.label_T`, int64 [T] of non-negative labels."""
        label_T = per_token_input(
            context.label_T, x_TD, "fixed", "label_T", "label (task, language or domain)"
        )
        choice_K = torch.arange(self.top_k, device=label_T.device)
        expert_TK = (label_T.unsqueeze(1) * self.top_k + choice_K) % self.num_experts
        return equal_weights(expert_TK, x_TD, self.num_experts, self.config.scale, context)


class HashRouter(StaticRouter):
    """Selects the experts that a hash of the token id gives."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        """Raise ValueError without `context.token_id_T`, int64 [T]."""
        token_T = per_token_input(context.token_id_T, x_TD, "hash", "token_id_T", "token id")
        expert_TK = hash_experts(token_T, self.top_k, self.num_experts, self.layer)
        return equal_weights(expert_TK, x_TD, self.num_experts, self.config.scale, context)


def equal_weights(
    expert_TK: Tensor, x_TD: Tensor, num_experts: int, scale: float, context: TokenContext
) -> Routing:
    """Route each token to its K distinct experts with weight `scale / K`. No host sync.

    Args:
        expert_TK: int64, distinct per token.
        x_TD: gives device and dtype.
        num_experts: E.
        scale: sum of a token's weights.
        context: `valid_T`.
    """
    tokens, top_k = expert_TK.shape
    zero_TE = x_TD.new_zeros(tokens, num_experts, dtype=router_dtype(x_TD))
    return Routing(
        expert_TK=expert_TK,
        weight_TK=zero_TE.new_full((tokens, top_k), scale / top_k),
        score_TE=zero_TE.scatter(1, expert_TK, 1 / top_k),
        logit_TE=zero_TE - math.log(num_experts),
        scale=scale,
        selected_TK=valid_choices(expert_TK, context),
    )


def hash_experts(token_T: Tensor, top_k: int, num_experts: int, layer: int) -> Tensor:
    """Return the hashed experts of each token, int64 [T, K], distinct per token.

    Args:
        token_T: int64 token ids.
        top_k: K.
        num_experts: E.
        layer: index among the MoE layers.
    """
    mixed_T = mix(token_T & MASK)
    selected: list[Tensor] = []
    for k in range(top_k):
        expert_T = mix((mixed_T + k + LAYER_STRIDE * layer) & MASK) % (num_experts - k)
        # Skip those taken, lowest first: each one at or below moves the index on by one.
        for taken_T in torch.stack(selected).sort(0).values if selected else ():
            expert_T = expert_T + (expert_T >= taken_T)
        selected.append(expert_T)
    return torch.stack(selected, dim=1)


def mix(word: Tensor) -> Tensor:
    """Map int64 words in [0, 2^32) one to one to pseudo-random ones."""
    word = word ^ (word >> 16)
    word = (word * MULTIPLIER_1) & MASK
    word = word ^ (word >> 15)
    # the same modulo 2^32, and small enough not to overflow
    word = (word * (MULTIPLIER_2 - 2**32)) & MASK
    return word ^ (word >> 16)
