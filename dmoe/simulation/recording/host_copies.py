"""Copies to the memory of the host and back in a step: `train.offload=activations`.

Stands for `torch.autograd.graph.save_on_cpu` in a dry run. Each tensor that is saved for the
backward is copied to the host in the forward, which frees it on the device, and back in the
backward. The copies are on the stream of the computation, so that nothing hides them.

Tensors of whole numbers (places of rows, counts) stay on the device here: their values are answered
by place in memory (`host_reads.py`), and they are small beside the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class HostCopies(saved_tensors_hooks):
    """Hooks that count each saved tensor when it leaves the device and when it returns.

    Args:
        count: called with the bytes of each copy.
        pin_memory: of `save_on_cpu`; changes no bytes.
    """

    def __init__(self, count: Callable[[int], None], pin_memory: bool = False) -> None:
        def pack(tensor: Tensor) -> Any:
            if not tensor.is_floating_point():
                return tensor
            count(tensor.numel() * tensor.element_size())
            return tensor.shape, tensor.dtype

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            shape, dtype = packed
            tensor = torch.empty(shape, dtype=dtype)
            count(tensor.numel() * tensor.element_size())
            return tensor

        super().__init__(pack, unpack)
