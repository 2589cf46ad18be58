"""Random numbers that depend on what they are for, never on which rank draws them or in which order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
