"""Constants on the device that a layer keeps from one forward to the next.

They are no buffers of a module because they are no state: checkpoints do not hold them, and
`to_empty` does not wipe them. A forward that finds one launches nothing and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class IndexRanges:
    """`0, step, ...` per device, dtype and step: the longest so far, and views; `arange` launches.

    8 bytes per assignment of the largest forward. Not kept in compiled code, which fuses `arange`.
    """

    def __init__(self) -> None:
        self.longest: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def get(
        self, length: int, device: torch.device, dtype: torch.dtype = torch.int64, step: int = 1
    ) -> Tensor:
        """Return the first `length` numbers, a view.

        Args:
            length: how many.
            device, dtype: of the numbers; `length * step` fits in the dtype.
            step: the difference of two.
        """
        if torch.compiler.is_compiling():
            return torch.arange(0, length * step, step, dtype=dtype, device=device)
        key = (device, dtype, step)
        kept = self.longest.get(key)
        if kept is None or len(kept) < length or not is_usable(kept):
            with torch.inference_mode(False):  # evaluation's may be read by training later
                kept = torch.arange(0, length * step, step, dtype=dtype, device=device)
            self.longest[key] = kept
        return kept[:length]


def is_usable(kept: Tensor) -> bool:
    """Return whether a constant of an earlier forward is one for this forward too.

    Not one that somebody has changed in place: a layer's counts are views of constants. Nor one of
    a FakeTensorMode that has ended, nor a real one within such a mode.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if mode is None and type(kept) is not Tensor:
        return False
    return kept._version == 0 and getattr(kept, "fake_mode", None) is mode


class HostConstant:
    """An integer tensor whose values the host knows, cached per device.

    A copy in every forward would make the host wait.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self.values = tuple(values)
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the values as int64 [n] on `device`."""
        kept = self._copies.get(device)
        if kept is None or not is_usable(kept):
            with torch.inference_mode(False):
                kept = torch.tensor(self.values, dtype=torch.int64, device=device)
            self._copies[device] = kept
        return kept
