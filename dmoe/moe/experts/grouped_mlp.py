"""Feed-forward experts, stacked on the expert dimension.

`feed_forward` computes all experts of rows that are grouped by expert: one at a time on the CPU
(`one_by_one.py`), all in one kernel on CUDA.

Letters: R rows, D input width, M output width, F hidden width, H = 2F for gated kinds, else F; I
and O: input and output width of one product; E experts, e local experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import matrix_shapes
from dmoe.moe.chunks import RowChunks
from dmoe.moe.experts.activation import activated_product, differentiable, two_products
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.copies import Weights, compute_experts
from dmoe.moe.experts.grouped_product import any_weight_grads, grouped_linear, groups_of
from dmoe.moe.experts.one_by_one import (
    SendGradient,
    TokenRows,
    rows_through_experts,
    tokens_through_experts,
)
from dmoe.moe.interfaces import RowCounts, TokensPerExpert
from dmoe.moe.placement import ExpertPlacement, contiguous_placement
from dmoe.moe.rng import normal_


class MLPExperts(Experts):
    """Uniform experts: expert e computes `activation(x @ w_in[e]) @ w_out[e]`.

    Gated kinds split the hidden rows in two. No biases: zero stays zero, so an empty slot
    contributes nothing, forward or backward.

    Parameters: `w_in` [e, D, H] and `w_out` [e, F, M]; of all E experts until `shard` keeps a
    contiguous run. They are cast to the rows' dtype (bf16 rows under autocast, float32 master
    weights).
    """

    takes_chunks = True
    takes_copies = True
    takes_order = True
    takes_tokens = True
    sends_gradient = True

    def __init__(
        self, kind: str, dim: int, expert_dim: int, num_experts: int, out_dim: int
    ) -> None:
        shapes = matrix_shapes([expert_dim], dim, out_dim, kind)
        super().__init__(kind, (shapes,) * num_experts)
        self.first = 0  # global id of the first local expert
        self.recompute_activation = False  # `train.recompute=activation`
        self.w_in = nn.Parameter(torch.empty(num_experts, *shapes[0]))
        self.w_out = nn.Parameter(torch.empty(num_experts, *shapes[1]))

    def forward(
        self,
        rows_RD: Any,
        tokens_per_expert: RowCounts | RowChunks,
        tokens: TokenRows | None = None,
        send_gradient: SendGradient | None = None,
        order_R: Tensor | None = None,
    ) -> Any:
        """Compute rows_RM; with `tokens`, the sum over each token's experts from tokens x_TD.

        With `send_gradient`, the backward gives it the rows' gradient before it computes others.
        With chunks, `rows_RD` is what has departed, and so is the result. With `order_R` (on the
        CPU), rows and results are in another order: it has the places of the rows by expert.
        """
        if order_R is not None:
            assert isinstance(tokens_per_expert, Tensor | int), "no copies and no chunks"
            sizes = sizes_of(tokens_per_expert, len(self.w_in))
            more = (sizes, send_gradient, order_R)
            return rows_through_experts(self.kind, rows_RD, self.w_in, self.w_out, *more)
        if tokens is not None:
            assert isinstance(tokens_per_expert, Tensor), "packed, all experts local"
            return tokens_through_experts(
                self.kind, rows_RD, self.w_in, self.w_out, tokens_per_expert.tolist(), *tokens
            )
        stacks = {"w_in": self.w_in, "w_out": self.w_out}
        if isinstance(tokens_per_expert, RowChunks):
            return tokens_per_expert.compute(self._rows, stacks, rows_RD)
        weights = {name: stack.to(rows_RD.dtype) for name, stack in stacks.items()}
        function = partial(self._rows, send_gradient)
        return compute_experts(function, weights, rows_RD, tokens_per_expert)

    def _rows(
        self,
        send_gradient: SendGradient | None,
        weights: Weights,
        rows_RD: Tensor,
        tokens_per_expert: TokensPerExpert,
    ) -> Tensor:
        more = (tokens_per_expert, self.recompute_activation, send_gradient, self.kernels)
        return feed_forward(self.kind, rows_RD, weights["w_in"], weights["w_out"], *more)

    def placement(self, ranks: int) -> ExpertPlacement:
        return contiguous_placement(self.num_experts, ranks)

    def shard(self, placement: ExpertPlacement, rank: int) -> None:
        owned = placement.experts[rank]
        self.slice_experts(owned[0], len(owned))

    def slice_experts(self, first: int, count: int) -> None:
        """Keep only the global experts `first .. first+count-1`."""
        self.first = first
        for name in ("w_in", "w_out"):
            whole = getattr(self, name)
            kept = whole.detach()[first : first + count].clone()
            setattr(self, name, nn.Parameter(kept, requires_grad=whole.requires_grad))

    def initialize(self, seed: int, layer: int, std: float, out_std: float) -> None:
        """Draw each expert from a generator keyed by its global id: the same at any EP size."""
        if self.w_in.is_meta:
            return  # thousands of experts take a second
        for local in range(len(self.w_in)):
            expert = self.first + local
            normal_(self.w_in[local], std, seed, "expert", layer, expert, "in")
            normal_(self.w_out[local], out_std, seed, "expert", layer, expert, "out")


def feed_forward(
    kind: str,
    rows_RD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    tokens_per_expert: TokensPerExpert,
    recompute_activation: bool = False,
    send_gradient: SendGradient | None = None,
    kernels: str = "torch",
) -> Tensor:
    """Compute `activation(rows @ w_in[e]) @ w_out[e]`, [R, D] -> [R, M].

    On the CPU expert by expert; on CUDA in three steps over all rows, where one large kernel
    beats e small ones. Keeps the rows and the hidden rows for backward. Host syncs: none (on the
    CPU, `tokens_per_expert` is in host memory).

    Args:
        kind: activation, a key of `ACTIVATIONS`.
        rows_RD: rows grouped by expert.
        w_in: [e, D, H], in the rows' dtype.
        w_out: [e, F, M], in the rows' dtype.
        tokens_per_expert: rows of each local expert; of unused rows, the result is zero.
        recompute_activation: compute the activated rows again in backward; always so on the CPU
            and with `send_gradient`.
        send_gradient: called with the rows' gradient before the weights' gradients are computed.
        kernels: `moe.kernels`; not read on the CPU.
    """
    if rows_RD.is_cuda:
        if send_gradient is not None:
            rules = (grouped_linear, any_weight_grads, send_gradient)
            groups = groups_of(rows_RD, w_in, tokens_per_expert)
            return two_products(kind, rows_RD, w_in, w_out, groups, *rules, kernels)
        weights = (w_in, w_out, tokens_per_expert, recompute_activation, kernels)
        return feed_forward_in_steps(kind, rows_RD, *weights)
    sizes = sizes_of(tokens_per_expert, len(w_in))
    return rows_through_experts(kind, rows_RD, w_in, w_out, sizes, send_gradient)


def sizes_of(tokens_per_expert: TokensPerExpert, experts: int) -> list[int]:
    """Return the rows of each expert as numbers; on the CPU they are in host memory."""
    if isinstance(tokens_per_expert, int):
        return [tokens_per_expert] * experts
    sizes: list[int] = tokens_per_expert.tolist()
    return sizes


def feed_forward_in_steps(
    kind: str,
    rows_RD: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    tokens_per_expert: TokensPerExpert,
    recompute_activation: bool = False,
    kernels: str = "torch",
) -> Tensor:
    """Compute `feed_forward` in three steps: the CUDA path, and the tests' reference."""
    groups = groups_of(rows_RD, w_in, tokens_per_expert)
    hidden_RH = grouped_linear(rows_RD, w_in, groups)
    if not recompute_activation:
        return grouped_linear(differentiable(kind, hidden_RH, kernels), w_out, groups)
    more = (groups, grouped_linear, any_weight_grads, kernels)
    return activated_product(kind, hidden_RH, w_out, *more)
