"""Answers to host reads of tensors without values: row counts, the device, one fused kernel.

Letters: T tokens of a forward, E experts, e of one rank, P = EP ranks, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from dmoe.distributed.exchange.once_per_rank import share_with_a_choice
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import ExpertLayer
from dmoe.moe.routing import DispatchPlan


class _Kernel(Function):
    """Stands for a fused kernel of the GPU: RMSNorm keeps input, weight and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_D, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x).copy_(x)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_D, _ = ctx.saved_tensors
        return torch.empty_like(x).copy_(grads[0]), torch.empty_like(weight_D)


CAPABILITY = (9, 0)
"""Of the GPU whose branches are taken: Hopper."""


def _fused_rms_norm(x: Tensor, shape: Any, weight_D: Tensor, eps: float) -> Tensor:
    return _Kernel.apply(x, weight_D)  # type: ignore[no-any-return, no-untyped-call]


class HostReads:
    """Answers what the code asks of tensors without values: counts by `load`, and the device.

    Args:
        load: rows that this rank receives over those of a balanced router.
        cuda: take the branches of a GPU.
    """

    def __init__(self, load: float, cuda: bool) -> None:
        self.load, self.cuda = load, cuda
        self.layer: Any = None
        self.rows_of_experts = 0
        """Rows that the experts of the current layer are given, unused ones too."""
        self.assignments = 0
        """Of the dispatch that is running; a bank of modules may have one per sequence."""
        self.tokens, self.targets, self.sequences, self.ranks = 0, 0, 1, 1
        self.answers: dict[Any, Any] = {}
        self.chunks: list[list[int]] = []
        """Rows of the local experts of each chunk whose counts are still to be read."""

    def watch(self, model: nn.Module) -> None:
        """Learn which layer of a model is running, and how many rows its experts are given."""

        def enter(module: nn.Module, inputs: Any) -> None:
            self.layer = module

        def enter_experts(module: nn.Module, inputs: Any) -> None:
            self.rows_of_experts = len(inputs[0])

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.layer = None

        def counted(dispatch: Any, x_TD: Tensor, plan: DispatchPlan) -> Any:
            self.assignments = plan.expert_TK.numel()
            return dispatch(x_TD, plan)

        for module in model.modules():
            if isinstance(module, ExpertLayer):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)
                module.experts.register_forward_pre_hook(enter_experts)
                packed: Any = module.packed
                packed.dispatch = partial(counted, packed.dispatch)

    def rows(self) -> list[int]:
        """Return the rows that this rank sends to each physical expert of the current layer."""
        layer, tokens = self.layer, self.tokens
        is_moe = isinstance(layer, MoELayer)
        experts = layer.num_experts if is_moe else layer.router.num_experts
        chosen, rest = divmod(tokens * layer.top_k if is_moe else self.assignments, experts)
        each = [chosen + (e < rest) for e in range(experts)]
        if not is_moe:
            return each
        each = each[: experts - layer.num_zero_cost]
        if (shape := layer.batch_shape(self.sequences, tokens)).capacity is not None:
            each = [min(rows, shape.capacity * shape.groups) for rows in each]
        placement = layer.placement
        spread = [0] * (placement.experts_per_rank * len(placement.experts))
        for expert, rows in zip(placement.physical_ids.values, each, strict=True):
            spread[expert] = rows
        return spread

    def counts(self, shape: torch.Size, first: int = 0) -> Any:
        """Answer a read of row counts: [2, P] sent and received, [e] per local expert, or all.

        [e + 1]: the last are unused rows (pooled capacity). Fewer: those from `first` (experts of
        one shape). [3, P]: tokens sent and received, and rows received
        (`parallel.exchange.once_per_rank`). [2, n, P]: of each chunk (`parallel.exchange.chunks`),
        and later [e/n] for one at a time.
        """
        rows = self.rows()
        if len(shape) == 0:
            return sum(rows)
        ranks = shape[-1] if len(shape) > 1 else self.ranks
        per_rank, load = len(rows) // ranks, self.load if ranks > 1 else 1.0
        mine = [round(load * ranks * n) for n in rows[:per_rank]]
        if len(shape) == 1:
            if self.chunks and len(self.chunks[0]) == shape[0] < per_rank:
                return self.chunks.pop(0)
            end = first + shape[0]
            assert end <= per_rank + 1, f"no answer for counts of shape {shape}"
            whole = mine if end <= per_rank else _with_unused(mine, self.rows_of_experts)
            return whole[first:end]
        if len(shape) == 3:
            size = per_rank // shape[1]
            starts = range(0, per_rank, size)
            self.chunks = [mine[start : start + size] for start in starts]
            parts = [
                [sum(rows[r * per_rank + start :][:size]) for r in range(ranks)] for start in starts
            ]
            return [parts, [_evenly(sum(chunk), ranks) for chunk in self.chunks]]
        sent = [sum(rows[r * per_rank : (r + 1) * per_rank]) for r in range(ranks)]
        received = _evenly(sum(mine), ranks)
        if shape[0] == 2:
            return [sent, received]
        share = share_with_a_choice(len(rows), per_rank, self.layer.top_k)
        tokens = round(self.tokens * share)
        return [
            [min(tokens, n) for n in sent],
            [min(round(load * tokens), n) for n in received],
            received,
        ]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Answer all reads of fake tensors in this block, also those of a backward.

        A `TorchFunctionMode` would not see what `backward` calls.
        """

        def scalar(tensor: Tensor) -> Any:
            return self.counts(tensor.shape) if self.layer else self.targets

        # fake tensors replace `tolist` by one `item` per element
        changes: list[tuple[Any, str, Any]] = [
            (FakeTensor, "tolist", lambda tensor: self.numbers(tensor)),
            (FakeTensor, "item", scalar),
            (FakeTensor, "__int__", scalar),
        ]
        if self.cuda:
            changes += [
                (FakeTensor, "is_cuda", True),
                (torch.cuda, "get_device_capability", lambda device: CAPABILITY),
                (torch.cuda, "Event", mock.MagicMock),  # torch for CPUs has none
                (torch.nn.functional, "rms_norm", _fused_rms_norm),
            ]
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(mock.patch.object(*change))
            yield

    def numbers(self, tensor: Tensor) -> Any:
        """Answer `tolist`: row counts in a layer, the same in its backward, else sums of 0."""
        if tensor.is_floating_point():
            return [0.0] * len(tensor)
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
        if self.layer is not None:
            self.answers[key] = self.counts(tensor.shape, int(tensor.storage_offset()))
        return self.answers[key]


def _evenly(total: int, ranks: int) -> list[int]:
    return [total // ranks + (r < total % ranks) for r in range(ranks)]


def _with_unused(used: list[int], rows: int) -> list[int]:
    """Add the unused rows of a block of `rows`; what exceeds the block is dropped."""
    found, left = list[int](), rows
    for count in used:
        found.append(min(count, left))
        left -= found[-1]
    return [*found, left]
