"""A stand-in for the package `deep_ep` (DeepEP 1): `Buffer` with its interface, over gloo.

Arguments, results, dtypes and assertions are those of `deep_ep/buffer.py` and its tests; how rows
travel is written here. Letters: T tokens, R tokens received, D width, K choices, P ranks.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """Make `import deep_ep` find the stub, in this process."""
    module = ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module


class Config:
    """Tuning of one kernel."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class EventOverlap:
    """The event of an asynchronous kernel."""


class Buffer:
    """Communication buffers of one group."""

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0
    ) -> None:
        self.group, self.num_ranks = group, dist.get_world_size(group)
        self.num_nvl_bytes = num_nvl_bytes

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        place = topk_idx.div(num_experts // self.num_ranks, rounding_mode="floor")
        is_in_TP = torch.stack([(place == p).any(1) for p in range(self.num_ranks)], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return is_in_TP.sum(0).int(), None, per_expert.int(), is_in_TP, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:
        self.check(x)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            token_N, send, recv = handle[:3]
            return self.send(x[token_N], send, recv), None, None, None, None, EventOverlap()
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        send = num_tokens_per_rank.tolist()
        recv = self.send(num_tokens_per_rank.long(), None, None).tolist()
        rank_N, token_N = is_token_in_rank.t().nonzero().unbind(1)
        local = len(num_tokens_per_expert) // self.num_ranks
        id_NK = topk_idx[token_N] - local * rank_N.unsqueeze(1)
        here_NK = (id_NK >= 0) & (id_NK < local)
        id_RK = self.send(id_NK.masked_fill(~here_NK, -1), send, recv)
        weight_RK = self.send(topk_weights[token_N].masked_fill(~here_NK, 0.0), send, recv)
        counts = torch.bincount(id_RK[id_RK >= 0], minlength=local).tolist()
        handle = (token_N, send, recv, len(x))
        x_RD = self.send(x[token_N], send, recv)
        return x_RD, id_RK, weight_RK, counts, handle, EventOverlap()

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self.check(x)
        token_N, send, recv, tokens = handle
        sums = []
        for rows in (x, topk_weights):
            if rows is None:
                continue
            assert rows.dtype == (torch.bfloat16 if rows is x else torch.float32)
            total = torch.zeros(tokens, rows.shape[1])
            total.index_add_(0, token_N, self.send(rows, recv, send).float())
            sums.append(total.to(rows.dtype))
        return sums[0], sums[1] if len(sums) > 1 else None, EventOverlap()

    def check(self, x: Tensor) -> None:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[1] * x.element_size() * self.num_ranks <= self.num_nvl_bytes

    def send(self, rows: Tensor, send: list[int] | None, recv: list[int] | None) -> Tensor:
        size = len(rows) if recv is None else sum(recv)
        received = rows.new_empty((size, *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), recv, send, group=self.group)
        return received
