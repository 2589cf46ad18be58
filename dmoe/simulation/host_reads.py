"""Answers to host reads of tensors without values: row counts, the device, one fused kernel.

Letters: T tokens of a forward, E experts, e of one rank, P = EP ranks, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from dmoe.moe.base_layer import MoELayer


class _Kernel(Function):
    """Stands for a fused kernel of the GPU: RMSNorm keeps input, weight and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_D, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x).copy_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_D, _ = ctx.saved_tensors
        return torch.empty_like(x).copy_(grads[0]), torch.empty_like(weight_D)


_fused_norm: Callable[[Tensor, Tensor], Tensor] = _Kernel.apply


class HostReads(TorchFunctionMode):
    """Answers what the code asks of tensors without values: counts by `load`, and the device.

    Args:
        load: rows that this rank receives over those of a balanced router.
        cuda: take the branches of a GPU.
    """

    def __init__(self, load: float, cuda: bool) -> None:
        super().__init__()
        self.load, self.cuda = load, cuda
        self.layer: Any = None
        self.tokens, self.targets, self.sequences, self.ranks = 0, 0, 1, 1
        self.answers: dict[Any, Any] = {}

    def rows(self) -> list[int]:
        """Return the rows that this rank sends to each physical expert of the current layer."""
        layer, tokens = self.layer, self.tokens
        top_k = layer.top_k if isinstance(layer, MoELayer) else layer.router.top_k
        experts = layer.num_experts if isinstance(layer, MoELayer) else layer.router.num_experts
        chosen, rest = divmod(tokens * top_k, experts)
        each = [chosen + (e < rest) for e in range(experts)]
        if not isinstance(layer, MoELayer):
            return each
        each = each[: experts - layer.num_zero_cost]
        if (shape := layer.batch_shape(self.sequences, tokens)).capacity is not None:
            each = [min(rows, shape.capacity * shape.groups) for rows in each]
        placement = layer.placement
        spread = [0] * (placement.experts_per_rank * len(placement.experts))
        for expert, rows in zip(placement.physical_ids.values, each, strict=True):
            spread[expert] = rows
        return spread

    def counts(self, shape: torch.Size) -> Any:
        """Answer a read of row counts: [2, P] sent and received, [e] per local expert, or all."""
        rows = self.rows()
        if len(shape) == 0:
            return sum(rows)
        ranks = shape[1] if len(shape) == 2 else self.ranks
        per_rank, load = len(rows) // ranks, self.load if ranks > 1 else 1.0
        mine = [round(load * ranks * n) for n in rows[:per_rank]]
        if len(shape) == 1:
            return mine if shape[0] == per_rank else [0] * shape[0]
        sent = [sum(rows[r * per_rank : (r + 1) * per_rank]) for r in range(ranks)]
        total = sum(mine)
        return [sent, [total // ranks + (r < total % ranks) for r in range(ranks)]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if self.cuda and func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return True
            if func in (torch.Tensor.__int__, torch.Tensor.item):
                return self.counts(args[0].shape) if self.layer else self.targets
        if self.cuda and func is torch.nn.functional.rms_norm:
            return _fused_norm(args[0], args[2])
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        # fake tensors replace this method by one `item` per element
        self.tolist = FakeTensor.tolist
        FakeTensor.tolist = lambda tensor: self.numbers(tensor)  # type: ignore
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        FakeTensor.tolist = self.tolist  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def numbers(self, tensor: Tensor) -> Any:
        """Answer `tolist`: row counts in a layer, the same in its backward, else sums of 0."""
        if tensor.is_floating_point():
            return [0.0] * len(tensor)
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
        if self.layer is not None:
            self.answers[key] = self.counts(tensor.shape)
        return self.answers[key]
