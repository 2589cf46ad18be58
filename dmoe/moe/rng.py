"""Random numbers keyed by their purpose, independent of rank and order of drawing.

Router noise: sequence b of a forward draws from the generator keyed by (seed, purpose, step, layer,
index of the sequence in the global batch), so neither the world size, nor the split into
micro-batches, nor recomputed activations change it. It is drawn on the tokens' device in float32 (a
copy from the host would wait for it), so CPU and CUDA draw different numbers from the same key.

Letters: T tokens, X values per token.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.moe.routing import BatchShape, TokenContext


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by a hash of `key`, e.g. `generator(seed, "expert", layer, id)`.

    Different keys give unrelated streams (64 bits of BLAKE2b). No collective, no host sync.
    """
    return torch.Generator(device).manual_seed(key_hash(*key))


def key_hash(*key: int | str) -> int:
    """Return a pseudo-random number of 63 bits for `key`, e.g. `key_hash(seed, "hot", layer)`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal_(tensor: Tensor, std: float, *key: int | str) -> None:
    """Fill `tensor` with N(0, std^2) drawn for `key`.

    Drawn on the CPU in float32, so that a GPU run starts from the same weights.
    """
    if tensor.is_meta:
        return
    drawn = torch.randn(tensor.shape, generator=generator(*key), dtype=torch.float32)
    with torch.no_grad():
        tensor.copy_(drawn.mul_(std))


class Draw(Protocol):
    """The signature of `torch.randn` and `torch.rand`."""

    def __call__(
        self,
        size: tuple[int, int],
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor: ...


def keyed_noise(
    draw: Draw,
    purpose: str,
    x_TX: Tensor,
    width: int,
    layer: int,
    context: TokenContext,
    shape: BatchShape,
) -> Tensor:
    """Draw noise per token, one generator per sequence. No host sync.

    Args:
        draw: `torch.randn` or `torch.rand`.
        purpose: part of the key, e.g. "jitter".
        x_TX: gives number of tokens, dtype and device.
        width: values per token.
        layer: index of the MoE layer, part of the key.
        context: `noise_key` and `first_sequence`.
        shape: number of sequences.

    Returns:
        [T, width] in the dtype of `x_TX`.

    Raises:
        ConfigError: no `noise_key`; unkeyed noise would silently change with the world size.
    """
    if context.noise_key is None:
        allowed = f"the router draws {purpose} in training, and needs a key for it"
        fix = "pass TokenContext(noise_key=(seed, step)), or call .eval() to route without noise"
        raise ConfigError("noise_key", None, allowed, fix)
    tokens = x_TX.shape[0]
    if x_TX.is_meta or tokens == 0:  # the meta device has no generator
        return x_TX.new_empty(tokens, width)
    assert tokens % shape.sequences == 0, (
        f"{tokens} tokens are not {shape.sequences} equal sequences"
    )
    seed, step = context.noise_key
    drawn = [
        draw(
            (tokens // shape.sequences, width),
            generator=generator(
                seed, purpose, step, layer, context.first_sequence + b, device=x_TX.device
            ),
            device=x_TX.device,
            dtype=torch.float32,
        )
        for b in range(shape.sequences)
    ]
    return torch.cat(drawn).to(x_TX.dtype)
