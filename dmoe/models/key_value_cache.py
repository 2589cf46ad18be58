"""Keys and values of past tokens, so that a new token of a text costs one position, not S.

    y = softmax(q k^T / sqrt(A) + mask) v    with k, v of the tokens before from the cache

Sequences of unequal length are padded on the left: the new token of each is the last column.
Padding is never attended to.

Letters: B sequences, S new tokens per sequence, L columns in use, C columns of the cache, H query
heads, N key/value heads, A width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.models.attention import Rotary, causal_attention, rotary_table


class KeyValueCache:
    """The cache of all layers of one model.

    Memory: 2 * layers * B * N * C * A numbers in the dtype of the keys.

    Args:
        layers: number of attention layers.
        columns: C, most tokens per sequence with padding.
        head_dim: A.
        rope_base: base of the rotary angles.
        padding: columns at the start of each sequence that hold no token.
        device: of the model.
        dtype: of the model's activations.
    """

    def __init__(
        self,
        layers: int,
        columns: int,
        head_dim: int,
        rope_base: float,
        *,
        padding: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.columns, self.length = columns, 0
        self.padding_B = torch.tensor(padding, device=device) if any(padding) else None
        self.layers = [LayerCache(self) for _ in range(layers)]
        self._table = rotary_table(columns, head_dim, rope_base, dtype, device)

    def rotary(self, new: int) -> Rotary:
        """Return the rotary table of the next `new` columns, [S, 1, A].

        Of columns, not of positions: scores depend on the difference of two positions alone, and
        padding moves both.
        """
        cos_C1A, sin_C1A = self._table
        part = slice(self.length, self.length + new)
        return cos_C1A[part], sin_C1A[part]

    def mask(self, new: int) -> Tensor | None:
        """Return which columns the next `new` ones attend to, bool [B or 1, 1, S, L].

        Padding attends to itself, so that no softmax is over nothing. None: all of them do to all.
        """
        if self.padding_B is None and new == 1:
            return None
        end = self.length + new
        device = self._table[0].device
        key_L, query_S1 = (
            torch.arange(end, device=device),
            torch.arange(self.length, end).unsqueeze(1),
        )
        query_S1 = query_S1.to(device)
        causal_SL = key_L <= query_S1
        if self.padding_B is None:
            return causal_SL[None, None]
        real_B1L = key_L >= self.padding_B[:, None, None]
        return ((causal_SL & real_B1L) | (key_L == query_S1)).unsqueeze(1)

    def advance(self, new: int) -> None:
        """Count `new` more columns, once every layer has stored them."""
        self.length += new

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these sequences, in this order."""
        index = torch.tensor(rows, device=self._table[0].device)
        if self.padding_B is not None:
            self.padding_B = self.padding_B[index]
        for layer in self.layers:
            layer.keep(index)


class LayerCache:
    """Keys and values of one attention layer, [B, N, C, A], allocated by the first forward."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def attend(self, q_BSHA: Tensor, k_BSNA: Tensor, v_BSNA: Tensor) -> Tensor:
        """Store the new keys and values and attend to all stored ones, [B, S, H, A].

        A first forward without padding is `causal_attention`: the kernel of a forward without
        cache.
        """
        cache, new = self.cache, q_BSHA.shape[1]
        start, end = cache.length, cache.length + new
        k_BNSA, v_BNSA = k_BSNA.transpose(1, 2), v_BSNA.transpose(1, 2)
        if self.key is None or self.value is None:
            batch, heads, _, width = k_BNSA.shape
            self.key = k_BNSA.new_zeros(batch, heads, cache.columns, width)
            self.value = torch.zeros_like(self.key)
        self.key[:, :, start:end], self.value[:, :, start:end] = k_BNSA, v_BNSA
        if start == 0 and cache.padding_B is None:
            return causal_attention(q_BSHA, k_BSNA, v_BSNA)
        out_BHSA = F.scaled_dot_product_attention(
            q_BSHA.transpose(1, 2),
            self.key[:, :, :end],
            self.value[:, :, :end],
            attn_mask=cache.mask(new),
            enable_gqa=q_BSHA.shape[2] != k_BSNA.shape[2],
        )
        return out_BHSA.transpose(1, 2)

    def keep(self, index: Tensor) -> None:
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[index], self.value[index]
