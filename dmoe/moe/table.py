"""A few integers that the host knows, as a tensor where it is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HostConstant"]


class HostConstant:
    """Copied to a device once and kept there: a copy in every forward would make the host wait.

    No buffer of a module, because it is no state: it is in no checkpoint, and `to_empty` does not wipe it.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.values = tuple(numbers)
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """int64 [n]."""
        if device not in self._copies:
            self._copies[device] = torch.tensor(self.values, dtype=torch.int64, device=device)
        return self._copies[device]
