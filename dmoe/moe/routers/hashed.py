"""Hash routing (Roller et al. 2021, "Hash Layers"): the experts follow from the token's id alone.

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

import torch
from torch import Tensor

from dmoe.moe.routers.base import RouterModule, per_token_input
from dmoe.moe.routers.unlearned import equal_weights
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["HashRouter", "hash_experts", "hash_reference", "mix"]

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
    word = (word * (SECOND - 2**32)) & MASK  # the same modulo 2^32, and small enough not to overflow
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
    return [left.pop(mixed((mixed(token) + k + LAYER_STRIDE * layer) % 2**32) % len(left)) for k in range(top_k)]
