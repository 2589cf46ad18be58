"""A copy of the state on the CPU, which training cannot change while it is written.

The copy lives in buffers that are kept from one save to the next: first writes to fresh pages cost the kernel more than the copy
itself (0.17 s against 0.06 s for 400 MB, measured), and pinned memory for an accelerator is dearer still.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dmoe.distributed.checkpoint.state import local_part

__all__ = ["Staging"]


class Staging:
    """One buffer a tensor, as large as this rank's part of it."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, state: Mapping[str, object]) -> dict[str, object]:
        """`state` with every tensor's local part copied to the CPU; what is no tensor is handed on, for `describe` to refuse.

        The result is valid until the next call, which writes into the same memory. Errors: out of memory.
        Cost: one pass over this rank's parts; from an accelerator all copies are queued, then waited for once.
        """
        self._buffers = {name: self._buffer(name, value) for name, value in state.items() if isinstance(value, Tensor)}
        for name, buffer in self._buffers.items():
            buffer.copy_(_source(state[name]), non_blocking=True)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return {name: _like(value, self._buffers[name]) if name in self._buffers else value for name, value in state.items()}

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers = {}

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        part, old = local_part(value), self._buffers.get(name)
        if old is not None and old.shape == part.shape and old.dtype == part.dtype:
            return old
        return torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=part.is_cuda)


def _source(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return local_part(value)


def _like(value: object, buffer: Tensor) -> Tensor:
    """`buffer` as the part of the DTensor it was copied from, or as it is.

    `DTensor.from_local` would move it to the device of the mesh; nothing but shapes, offsets and this rank's part is asked of
    the result, so its constructor is enough.
    """
    if not isinstance(value, DTensor):
        return buffer
    return DTensor(buffer, value._spec, requires_grad=False)
