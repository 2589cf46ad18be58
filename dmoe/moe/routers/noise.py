"""Random numbers for routing that depend on the sequence they are for, and on nothing else.

Sequence b of a forward draws from the generator keyed by (seed, what, step, layer, index of the sequence in the global batch), so
neither the world size, nor the cut into micro-batches, nor a recomputed activation changes them. Drawn on the tokens' device in
float32 (a copy from the host would wait for it), so CPU and CUDA draw different numbers from the same key.

Letters: T tokens, S tokens a sequence, X numbers a token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dmoe.moe.keyed import generator
from dmoe.moe.routing import TokenContext

__all__ = ["keyed_noise"]


class Draw(Protocol):
    """`torch.randn` or `torch.rand`."""

    def __call__(
        self, size: tuple[int, int], *, generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> Tensor: ...


def keyed_noise(draw: Draw, what: str, x_TX: Tensor, width: int, layer: int, context: TokenContext) -> Tensor:
    """[T, width] in the dtype of `x_TX`: one draw for each of `context.sequences` sequences. No host sync.

    Raises ValueError where the context holds no key: noise that changed with the world size would be drawn silently otherwise.
    """
    if context.noise_key is None:
        raise ValueError(
            f"the router draws {what} in training and needs a key for it: "
            "pass TokenContext(noise_key=(seed, step)), or call .eval() to route without noise"
        )
    tokens = x_TX.shape[0]
    if x_TX.is_meta or tokens == 0:  # there is no generator on the meta device, and nothing to draw for
        return x_TX.new_empty(tokens, width)
    assert tokens % context.sequences == 0, f"{tokens} tokens are not {context.sequences} equal sequences"
    seed, step = context.noise_key
    drawn = [
        draw(
            (tokens // context.sequences, width),
            generator=generator(seed, what, step, layer, context.first_sequence + b, device=x_TX.device),
            device=x_TX.device,
            dtype=torch.float32,
        )
        for b in range(context.sequences)
    ]
    return torch.cat(drawn).to(x_TX.dtype)
