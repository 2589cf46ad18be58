"""The exchange by a library of the kind of DeepEP (`parallel.exchange.library=deep_ep`).

The library moves tokens with kernels of its own, over NVLink inside a node and RDMA between nodes:

    get_dispatch_layout(ids)             which tokens go to which rank
    dispatch(tokens, ids, weights)       a token once to each rank of its experts; a handle
    combine(rows, handle)                the sum of each token's rows on its own rank
    backward                             that of dispatch is combine, that of combine is dispatch

So this is `once_per_rank` (`once_per_rank.py` says how a rank computes the tokens that it gets),
with its rows and sums. What is called is `deep_ep.Buffer` of DeepEP 1 (its README and tests,
https://github.com/deepseek-ai/DeepEP), without asynchronous events. A library with the same
interface works too.

Numbers: rows are bfloat16, combine weights float32. The sum over ranks is made by the library, in
float32 and rounded once in DeepEP, in an order of its own.

Cost: forward one dispatch and one combine, backward one of each; the library reads the number of
rows on the host, once per forward. Bytes per rank: those of `once_per_rank`, with ids of 8 bytes.
Letters: T tokens, D width, M output width, K experts per token, e local experts, R tokens received.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from dmoe.config.errors import ConfigError
from dmoe.distributed.all_to_all import ExpertGroup, PackedAllToAll
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.dispatch import packed_permutation, permute, profiled, unpermute
from dmoe.moe.experts.one_by_one import TokenRows
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import ExpertLayer, SentTokens, TokenDispatcher
from dmoe.moe.routing import DispatchPlan

FIELD = "parallel.exchange.library"


class LibraryBuffer:
    """The library's communication buffer of one group of ranks, which all layers share.

    Made at the first dispatch, and again for wider rows: all ranks of `group` at the same time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.library = _load_library()
        self.group, self.row_bytes = group, 0
        self.buffer: Any = None

    def of(self, rows: Tensor) -> Any:
        """Return a buffer that `rows` fit in."""
        row_bytes = rows.shape[1] * max(2, rows.element_size())
        if row_bytes > self.row_bytes:
            kind, ranks = self.library.Buffer, dist.get_world_size(self.group)
            configs = (kind.get_dispatch_config(ranks), kind.get_combine_config(ranks))
            inside, between = (
                max(
                    getattr(config, f"get_{link}_buffer_size_hint")(row_bytes, ranks)
                    for config in configs
                )
                for link in ("nvl", "rdma")
            )
            self.buffer, self.row_bytes = kind(self.group, inside, between), row_bytes
        return self.buffer


def _load_library() -> Any:
    try:
        library: Any = importlib.import_module("deep_ep")
    except ImportError as error:
        allowed = f"needs the package deep_ep, which cannot be imported ({error})"
        raise ConfigError(FIELD, "deep_ep", allowed, "install DeepEP, or use torch") from None
    return library


class Sent(NamedTuple):
    """One dispatch: what `combine` and both backwards need."""

    buffer: Any
    handle: Any
    group: ExpertGroup
    rows: int
    """Tokens sent to other ranks; -1 if they are not measured."""
    rows_back: int
    """Tokens received from other ranks."""


class DeepEP(PackedAllToAll, TokenDispatcher):
    """Dispatcher that leaves the exchange to a library; the library reads the host once."""

    def __init__(self, expert_group: ExpertGroup, buffer: LibraryBuffer) -> None:
        super().__init__(expert_group)
        self.buffer = buffer

    def send_tokens(self, x_TD: Tensor, plan: DispatchPlan) -> SentTokens:
        """Send each token once to each rank that has one of its experts."""
        if x_TD.dtype != torch.bfloat16:
            dtype = str(x_TD.dtype).removeprefix("torch.")
            allowed = f"sends rows of bfloat16, not of {dtype}"
            raise ConfigError(FIELD, "deep_ep", allowed, "use train.precision=bf16, or torch")
        found = list[Any]()
        x_RD, weight_RK, id_RK = _Dispatch.apply(x_TD, plan.weight_TK, plan, self, found)
        rows, sent = found
        keep_RK, num_experts = id_RK >= 0, plan.num_experts // self.num_ranks
        received = DispatchPlan(id_RK.clamp(min=0).long(), weight_RK, keep_RK, num_experts)
        permutation, count_e = packed_permutation(received)
        tokens = TokenRows(permutation.first_rows(rows), weight_RK)
        return SentTokens(x_RD, count_e, tokens, (sent, tokens))

    def return_sums(self, y_RM: Tensor, metadata: tuple[Sent, TokenRows]) -> Tensor:
        """Return the sum of each received token to its rank, and add those of all ranks."""
        y_TM: Tensor = _Combine.apply(y_RM, metadata[0])
        return y_TM

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Any:
        """Send the tokens and copy them to the rows of the experts."""
        x_RD, count_e, tokens, metadata = self.send_tokens(x_TD, plan)
        return permute(x_RD, tokens.permutation), count_e, metadata

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        """Sum the rows of each token here, with the weights that it came with, and return them."""
        tokens = metadata[1]
        return self.return_sums(unpermute(rows_RD, tokens.weight_TK, tokens.permutation), metadata)

    def start(
        self, x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan
    ) -> tuple[Tensor, Tensor, Tensor, int, Sent]:
        """Dispatch.

        Returns:
            Tokens, weights and local expert ids (-1: not here), the rows of all experts, the rest.
        """
        buffer, group = self.buffer.of(x_TD), self.expert_group
        id_TK = plan.expert_TK.masked_fill(~plan.is_kept_TK, -1).contiguous()
        per_rank, per_node, per_expert, is_in_rank_TP, _ = buffer.get_dispatch_layout(
            id_TK, plan.num_experts
        )
        rows = -1
        if group.timer.clock is not None:
            own = int(per_rank[dist.get_rank(group.group)])
            rows = int(per_rank.sum()) - own
        with profiled("exchange"), group.timer.waiting():
            x_RD, id_RK, weight_RK, rows_of_experts, handle, _ = buffer.dispatch(
                x_TD.contiguous(),
                topk_idx=id_TK,
                topk_weights=weight_TK.float().contiguous(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=is_in_rank_TP,
                num_tokens_per_expert=per_expert,
            )
        sent = Sent(buffer, handle, group, rows, len(x_RD) - own if rows >= 0 else -1)
        more = id_TK.shape[1] * (8 + 4)
        _count(sent, rows, x_TD, more)
        return x_RD, weight_RK, id_RK, sum(rows_of_experts), sent


def _count(sent: Sent, rows: int, like: Tensor, more: int = 0) -> None:
    if sent.group.timer.clock is not None and rows >= 0:
        sent.group.timer.sent_bytes += rows * (like.shape[1] * like.element_size() + more)


class _Dispatch(Function):
    """Tokens and weights -> those received, and local expert ids, [R, D], [R, K], [R, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        plan: DispatchPlan,
        dispatcher: DeepEP,
        found: list[Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_RD, weight_RK, id_RK, rows, sent = dispatcher.start(x_TD, weight_TK, plan)
        found += [rows, sent]
        ctx.sent, ctx.dtype = sent, weight_TK.dtype
        ctx.mark_non_differentiable(id_RK)
        return x_RD, weight_RK, id_RK

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent: Sent = ctx.sent
        _count(sent, sent.rows_back, grads[0], 4 * grads[1].shape[1])
        with profiled("exchange"), sent.group.timer.waiting():
            grad_TD, grad_TK, _ = sent.buffer.combine(
                grads[0].contiguous(), sent.handle, topk_weights=grads[1].float().contiguous()
            )
        return grad_TD, grad_TK.to(ctx.dtype), None, None, None


class _Combine(Function):
    """The sums of received tokens -> their sums over the ranks, [R, M] -> [T, M]."""

    @staticmethod
    def forward(ctx: Any, y_RM: Tensor, sent: Sent) -> Tensor:
        ctx.sent = sent
        _count(sent, sent.rows_back, y_RM)
        with profiled("exchange"), sent.group.timer.waiting():
            y_TM: Tensor = sent.buffer.combine(y_RM.contiguous(), sent.handle)[0]
        return y_TM

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sent: Sent = ctx.sent
        _count(sent, sent.rows, grads[0])
        with profiled("exchange"), sent.group.timer.waiting():
            grad_RM: Tensor = sent.buffer.dispatch(grads[0].contiguous(), handle=sent.handle)[0]
        return grad_RM, None


def check_library(layer: ExpertLayer, checked: bool) -> None:
    """Refuse a layer whose tokens the library cannot send. Raises ConfigError.

    Args:
        layer: one layer with experts.
        checked: whether `debug.collectives` compares every exchange.
    """
    why = None
    if not isinstance(layer, MoELayer):
        why = f"needs MoE layers, not {type(layer).__name__}"
    elif layer.padded is not None:
        why = "needs the packed exchange: padded slots are rows of the experts"
    elif type(layer.packed) is not PackedAllToAll:
        why = "has an exchange of its own, without other options or copies for the step"
    elif checked:
        why = "cannot be compared by debug.collectives, which sees collectives of torch"
    if why is not None:
        raise ConfigError(FIELD, "deep_ep", why, "use torch")
