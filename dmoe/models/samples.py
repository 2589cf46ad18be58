"""Samples: inputs and targets of a model, and what its layers are told of their tokens.

Letters: B samples, S positions with a target per sample, T = B*S.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmoe.data.sequences.token_dataset import TokenDataset
from dmoe.data.sequences.token_masks import NO_MASKS, TokenMasks
from dmoe.models.base import IGNORE_INDEX
from dmoe.moe.routing import TokenContext


class Samples(NamedTuple):
    """Consecutive samples of one split."""

    input: Tensor
    """[B, ...]: input of the model."""
    target: Tensor
    """int64 [B, S]; IGNORE_INDEX is not predicted."""
    label_B: Tensor
    """int64: domain of each sample, an index into the data's `domains`."""
    position_BS: Tensor | None = None
    """int64: position of each token in its document (`TokenContext.position_T`). None: each sample
    is one document, which costs no mask."""
    valid_BS: Tensor | None = None
    """bool: False for tokens that are padding. None: there is none."""

    def pad(self, empty: Samples) -> Samples:
        """Return the samples followed by those of `empty`, to its number; they have no target.

        `valid_BS` is a tensor in the result.
        """
        count, missing = len(self.input), len(empty.input) - len(self.input)
        ones_BS = torch.ones_like(self.target, dtype=torch.bool)
        valid_BS = ones_BS if self.valid_BS is None else self.valid_BS
        none_MS = torch.zeros_like(empty.target[count:], dtype=torch.bool)
        position_BS = self.position_BS
        if position_BS is not None and missing:
            plain_MS = torch.arange(position_BS.shape[1]).expand(missing, -1)
            position_BS = torch.cat([position_BS, plain_MS])
        return Samples(
            torch.cat([self.input, empty.input[count:]]),
            torch.cat([self.target, torch.full_like(empty.target[count:], IGNORE_INDEX)]),
            torch.cat([self.label_B, empty.label_B[count:]]),
            position_BS,
            torch.cat([valid_BS, none_MS]),
        )

    def no_rows(self) -> Samples:
        """Return samples of the same shapes without any row."""
        position_BS, valid_BS = self.position_BS, self.valid_BS
        return Samples(
            self.input[:0],
            self.target[:0],
            self.label_B[:0],
            None if position_BS is None else position_BS[:0],
            None if valid_BS is None else valid_BS[:0],
        )

    def context(
        self, device: torch.device | str = "cpu", noise_key: tuple[int, int] | None = None
    ) -> TokenContext:
        """Return what the layers are told, one value per token."""

        def flat(value_BS: Tensor | None) -> Tensor | None:
            return None if value_BS is None else value_BS.flatten().to(device)

        return TokenContext(
            label_T=self.label_B.repeat_interleave(self.target.shape[1]).to(device),
            position_T=flat(self.position_BS),
            valid_T=flat(self.valid_BS),
            noise_key=noise_key,
        )


def read_masks(dataset: TokenDataset, method: str, *samples: int) -> TokenMasks:
    """Return positions and masks; a user's own dataset without the method has plain sequences."""
    read = getattr(dataset, method, None)
    return NO_MASKS if read is None else read(*samples)


def collate_tokens(token_BS: np.ndarray, label_B: np.ndarray, masks: TokenMasks) -> Samples:
    """Return sequences of S + 1 tokens as inputs and targets, with what is known of them."""
    tokens, valid_BS = torch.from_numpy(token_BS), masks.valid_BS
    target = tokens[:, 1:]
    if masks.predicted_BS is not None:
        target = target.masked_fill(~torch.from_numpy(masks.predicted_BS), IGNORE_INDEX)
    return Samples(
        tokens[:, :-1],
        target,
        torch.from_numpy(label_B),
        _positions(masks.position_BS),
        None if valid_BS is None else torch.from_numpy(valid_BS),
    )


def _positions(position_BS: np.ndarray | None) -> Tensor | None:
    """Return positions as a tensor, or None if each sequence is one document: it needs no mask."""
    if position_BS is None or (position_BS == np.arange(position_BS.shape[1])).all():
        return None
    return torch.from_numpy(position_BS)


def target_bytes(byte_V: Tensor, target: Tensor) -> Tensor:
    """Return the bytes of each target, 0 for those that are not predicted.

    Args:
        byte_V: bytes of each token of the vocabulary.
        target: int64 of any shape.
    """
    return byte_V[target.clamp(min=0)].masked_fill(target == IGNORE_INDEX, 0)
