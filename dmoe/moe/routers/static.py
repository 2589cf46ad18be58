"""What routers without parameters return: K experts of equal weight, and scores that make the statistics come out right.

`score` is 1/K for the chosen and 0 elsewhere, so P_e = f_e and the Switch loss E * sum_e f_e P_e becomes E * sum_e f_e^2: a measure
of the imbalance, 1 at perfect balance, with no gradient to send. All logits are -ln E, so that logsumexp, which the z-loss would
shrink, is already 0. A balance loss of such a router is therefore reported and trains nothing.

Letters: T tokens, D width, E experts, K experts a token.

Fixed routing: the experts follow from a label that comes with the batch (task, language, domain; as in DEMix, Gururangan 2022).

    experts of a token = (label * K + k) mod E,  k = 0 .. K-1;      weights 1/K, scaled

So with E = K * labels every label has K experts of its own. Nothing is learned and nothing is random; the auxiliary losses are
constants without a gradient (see `unlearned.py`). Cost: K integers a token.

Letters: T tokens, D width, E experts, K experts a token.

Hash routing (Roller et al. 2021, "Hash Layers"): the experts follow from the token's id alone.

    h_k = mix(mix(token id) + k + 64 * layer) mod (E - k),   k = 0 .. K-1
    the k-th expert is the h_k-th of those, in order of their ids, that this token has not taken yet

so a token has K distinct experts, each set of K about equally often, and another set in every layer (the same in all layers would
send the same tokens through the same chain of experts). Nothing is learned; weights are 1/K, scaled. Frequent tokens make frequent
experts: the load is as uneven as the text.

`mix` is a 32-bit finaliser (Wellons 2018, "lowbias32"), in int64 arithmetic that never leaves 63 bits, so CPU and CUDA agree exactly.
Cost: O(K^2) integer operations a token. No collective, no host sync.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.moe.routers.base import RouterModule, per_token_input, router_dtype, valid_choices
from dmoe.moe.routing import Routing, TokenContext


def equal_weights(
    expert_TK: Tensor, x_TD: Tensor, num_experts: int, scale: float, context: TokenContext
) -> Routing:
    """The routing that sends each token to its K distinct experts with weight `scale / K`. No host sync."""
    tokens, top_k = expert_TK.shape
    zero_TE = x_TD.new_zeros(tokens, num_experts, dtype=router_dtype(x_TD))
    return Routing(
        expert_TK=expert_TK,
        weight_TK=zero_TE.new_full((tokens, top_k), scale / top_k),
        score_TE=zero_TE.scatter(1, expert_TK, 1 / top_k),
        logit_TE=zero_TE - math.log(num_experts),
        scale=scale,
        keep_TK=valid_choices(expert_TK, context),
    )


class FixedRouter(RouterModule):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        """Raises ValueError without `context.label_T`, int64 [T] of non-negative labels."""
        label_T = per_token_input(
            context.label_T, x_TD, "fixed", "label_T", "label (task, language or domain)"
        )
        choice_K = torch.arange(self.top_k, device=label_T.device)
        expert_TK = (label_T.unsqueeze(1) * self.top_k + choice_K) % self.num_experts
        return equal_weights(expert_TK, x_TD, self.num_experts, self.config.scale, context)


def fixed_reference(label: int, top_k: int, num_experts: int) -> list[int]:
    """For tests."""
    return [(label * top_k + k) % num_experts for k in range(top_k)]


MASK = 0xFFFFFFFF
FIRST = 0x7FEB352D
SECOND = 0x846CA68B
LAYER_STRIDE = 64  # a multiple of it separates the layers' keys; only if K were larger would two layers share one


class HashRouter(RouterModule):
    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        """Raises ValueError without `context.token_id_T`, int64 [T]."""
        token_T = per_token_input(context.token_id_T, x_TD, "hash", "token_id_T", "token id")
        expert_TK = hash_experts(token_T, self.top_k, self.num_experts, self.layer)
        return equal_weights(expert_TK, x_TD, self.num_experts, self.config.scale, context)


def hash_experts(token_T: Tensor, top_k: int, num_experts: int, layer: int) -> Tensor:
    """int64 [T, K], distinct in each row."""
    mixed_T = mix(token_T & MASK)
    chosen: list[Tensor] = []
    for k in range(top_k):
        expert_T = mix((mixed_T + k + LAYER_STRIDE * layer) & MASK) % (num_experts - k)
        # Skip those taken, lowest first: each one at or below moves the index on by one.
        for taken_T in torch.stack(chosen).sort(0).values if chosen else ():
            expert_T = expert_T + (expert_T >= taken_T)
        chosen.append(expert_T)
    return torch.stack(chosen, dim=1)


def mix(word: Tensor) -> Tensor:
    """Scrambles int64 words in [0, 2^32) one to one."""
    word = word ^ (word >> 16)
    word = (word * FIRST) & MASK
    word = word ^ (word >> 15)
    word = (
        word * (SECOND - 2**32)
    ) & MASK  # the same modulo 2^32, and small enough not to overflow
    return word ^ (word >> 16)


def hash_reference(token: int, top_k: int, num_experts: int, layer: int) -> list[int]:
    """One token's experts, drawn from a shrinking list. For tests."""

    def mixed(word: int) -> int:
        word ^= word >> 16
        word = word * FIRST % 2**32
        word ^= word >> 15
        word = word * SECOND % 2**32
        return word ^ (word >> 16)

    left = list(range(num_experts))
    return [
        left.pop(mixed((mixed(token) + k + LAYER_STRIDE * layer) % 2**32) % len(left))
        for k in range(top_k)
    ]
