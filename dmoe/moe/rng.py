"""Random numbers that depend on what they are for, never on which rank draws them or in which order."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from dmoe.moe.routing import TokenContext


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose seed is a hash of `key`, e.g. `generator(seed, "expert", layer, expert_id)`.

    Two different keys give unrelated streams (64 bits of BLAKE2b). No collective, no host sync.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_(tensor: Tensor, std: float, *key: int | str) -> None:
    """Fill `tensor` with N(0, std^2) drawn for `key`: on the CPU in float32, so that a GPU run starts from the same weights."""
    if tensor.is_meta:
        return
    drawn = torch.randn(tensor.shape, generator=generator(*key), dtype=torch.float32)
    with torch.no_grad():
        tensor.copy_(drawn.mul_(std))


class Draw(Protocol):
    """`torch.randn` or `torch.rand`."""

    def __call__(
        self,
        size: tuple[int, int],
        *,
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor: ...


def keyed_noise(
    draw: Draw, what: str, x_TX: Tensor, width: int, layer: int, context: TokenContext
) -> Tensor:
    """[T, width] in the dtype of `x_TX`: one draw for each of `context.sequences` sequences. No host sync.

    Raises ValueError where the context holds no key: noise that changed with the world size would be drawn silently otherwise.
    """
    if context.noise_key is None:
        raise ValueError(
            f"the router draws {what} in training and needs a key for it: "
            "pass TokenContext(noise_key=(seed, step)), or call .eval() to route without noise"
        )
    tokens = x_TX.shape[0]
    if (
        x_TX.is_meta or tokens == 0
    ):  # there is no generator on the meta device, and nothing to draw for
        return x_TX.new_empty(tokens, width)
    assert tokens % context.sequences == 0, (
        f"{tokens} tokens are not {context.sequences} equal sequences"
    )
    seed, step = context.noise_key
    drawn = [
        draw(
            (tokens // context.sequences, width),
            generator=generator(
                seed, what, step, layer, context.first_sequence + b, device=x_TX.device
            ),
            device=x_TX.device,
            dtype=torch.float32,
        )
        for b in range(context.sequences)
    ]
    return torch.cat(drawn).to(x_TX.dtype)
