"""The exchange that sends a token once per rank (`parallel.exchange.once_per_rank`).

    packed           token -> one row per choice -> experts -> one row per choice -> their sum
    once per rank    token -> one row per rank that has one of its experts
                           -> rows of the experts there, and their sum
                           -> one row per such rank -> their sum

A token of K choices has on average P (1 - C(E - e, K) / C(E, K)) rows in place of K: 67% of them at
K = 8 and P = 8, 25% at P = 2. A token's choices on a rank are sent in its row, behind the
D numbers: K combine weights and local expert ids, unused ones e. (K even where a rank has fewer
experts: a router of one's own may choose one twice.) So the sums over a token's experts are made
where the experts are, and there the layer is that of one process: on the CPU the experts gather
their rows from the tokens, and neither rows nor outputs are kept.

Numbers: sums of the choices on each rank, then of the ranks, each in the rows' dtype. So outputs
and gradients are those of the packed exchange within rounding; choices, drops and counts exactly.

Cost: forward 3 collectives and one host read, backward 2, as packed. Bytes per rank and direction:
(rows for other ranks) * (D * itemsize + K * (weight's bytes + id's bytes)), D * itemsize for the
combine. Letters: T tokens, D width, M output width, P ranks, E experts, e local experts, K experts
per token, N tokens sent to ranks, R tokens received.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.config.errors import ConfigError
from dmoe.distributed.all_to_all import ExpertGroup, PackedAllToAll
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.dispatch import (
    Permutation,
    packed_permutation,
    permute,
    sum_over_choices,
    unpermute,
)
from dmoe.moe.experts.one_by_one import TokenRows
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import ExpertLayer, SentTokens, TokenDispatcher
from dmoe.moe.routing import DispatchPlan

ALIGNMENT = 8
"""Bytes; a row of a message is a multiple of them, so that its parts can be views."""


class Route(NamedTuple):
    """The tokens that this rank sends and receives."""

    permutation: Permutation
    """Of pairs of token and rank, by rank; a token has no row for a rank without its experts."""
    slot_TK: Tensor
    """int64: the slot of each choice among the N * K of the message, N * K if it is dropped."""
    num_experts: int
    """e."""
    send_counts: list[int]
    """Tokens for each rank."""
    recv_counts: list[int]
    """Tokens from each rank."""
    num_rows: int
    """Rows of this rank's experts."""


class OncePerRank(PackedAllToAll, TokenDispatcher):
    """The packed dispatcher that sends a token once to each rank of its experts."""

    def send_tokens(self, x_TD: Tensor, plan: DispatchPlan) -> SentTokens:
        """Send each token, and what its choices are, to the ranks of its experts."""
        route = self.route(plan)
        x_RD, weight_RK, id_RK = _SendTokens.apply(
            x_TD, plan.weight_TK, plan.expert_TK, route, self.expert_group
        )
        expert_RK, keep_RK = id_RK.long(), id_RK != route.num_experts
        received = DispatchPlan(expert_RK, weight_RK, keep_RK, route.num_experts)
        permutation, count_e = packed_permutation(received)
        tokens = TokenRows(permutation.first_rows(route.num_rows), weight_RK)
        return SentTokens(x_RD, count_e, tokens, (route, tokens))

    def return_sums(self, y_RM: Tensor, metadata: tuple[Route, TokenRows]) -> Tensor:
        """Return the sum of each received token to its rank, and add those of all ranks."""
        route = metadata[0]
        y_NM = self.expert_group.all_to_all_autograd(
            y_RM, route.recv_counts, route.send_counts, "combine"
        )
        y_TM: Tensor = _SumOverRanks.apply(y_NM, route.permutation)
        return y_TM

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Any:
        """Send the tokens and copy them to the rows of the experts."""
        x_RD, count_e, tokens, metadata = self.send_tokens(x_TD, plan)
        return permute(x_RD, tokens.permutation), count_e, metadata

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        """Sum the rows of each token here, with the weights that it came with, and return them."""
        _, tokens = metadata
        return self.return_sums(unpermute(rows_RD, tokens.weight_TK, tokens.permutation), metadata)

    def route(self, plan: DispatchPlan) -> Route:
        """Exchange the number of tokens and of rows: one all-to-all, one host read."""
        tokens, top_k = plan.expert_TK.shape
        num_experts = plan.num_experts // self.num_ranks
        rank_TK, keep_TK = plan.expert_TK // num_experts, plan.is_kept_TK
        count_TP = keep_TK.new_zeros(tokens, self.num_ranks, dtype=torch.int64)
        count_TP.scatter_add_(1, rank_TK, keep_TK.long())
        rank_TP = torch.arange(self.num_ranks, device=rank_TK.device).expand(tokens, -1)
        once = DispatchPlan(rank_TP, plan.weight_TK, count_TP > 0, self.num_ranks)
        permutation, count_P = packed_permutation(once)
        count_P2 = torch.stack([count_P, count_TP.sum(0)], 1)
        recv_P2, more_P2 = self.expert_group.exchange_counts(count_P2)
        counts = [count_P2[:, :1], recv_P2] + ([] if more_P2 is None else [more_P2[:, :1]])
        # The only host read: the split sizes, and the rows of the experts.
        read = torch.cat(counts, 1).t().tolist()
        rows = read.pop(2)
        sent, received = self.expert_group.splits(read)
        permutation = permutation.first_rows(sum(sent))

        # how many earlier choices of the token are on the same rank
        same_TKK = (rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)) & keep_TK.unsqueeze(1)
        place_TK = same_TKK.tril(-1).sum(2)
        slot_TK = permutation.row_TK.gather(1, rank_TK) * top_k + place_TK
        slot_TK = slot_TK.masked_fill(~keep_TK, sum(sent) * top_k)
        return Route(permutation, slot_TK, num_experts, sent, received, sum(rows))


def share_with_a_choice(experts: int, of_rank: int, top_k: int) -> float:
    """Return the share of tokens that choose one of a rank's experts, if all are equally likely."""
    return 1 - math.comb(experts - of_rank, top_k) / math.comb(experts, top_k)


class _Parts(NamedTuple):
    """A message of tokens, uint8 [N, B], and its parts as views of other dtypes."""

    message: Tensor
    rows_ND: Tensor
    weight_NK: Tensor
    id_NK: Tensor

    @classmethod
    def of(cls, message: Tensor, *columns: tuple[int, torch.dtype]) -> _Parts:
        """Return the views of rows, weights and ids, each of a number of columns of a dtype."""
        parts, start = {}, 0
        # the widest first: each begins at a multiple of its own size
        for n in sorted(range(len(columns)), key=lambda n: -columns[n][1].itemsize):
            number, dtype = columns[n]
            end = start + number * dtype.itemsize
            parts[n], start = message[:, start:end].view(dtype), end
        return cls(message, parts[0], parts[1], parts[2])


def _layout(like: Tensor, weight: Tensor, route: Route, group: ExpertGroup) -> tuple[int, Any]:
    """Return the bytes of a message's row, and the arguments of `_Parts.of`."""
    id_dtype = torch.uint8 if route.num_experts < 256 else torch.int32
    columns = (
        (like.shape[1], like.dtype if group.wire is None else group.wire),
        (route.slot_TK.shape[1], weight.dtype),
        (route.slot_TK.shape[1], id_dtype),
    )
    size = sum(number * dtype.itemsize for number, dtype in columns)
    return -(-size // ALIGNMENT) * ALIGNMENT, columns


class _SendTokens(Function):
    """Tokens and weights -> those received, and local expert ids, [R, D], [R, K], [R, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        route: Route,
        group: ExpertGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route, ctx.group = route, group
        ctx.dtypes = (x_TD.dtype, weight_TK.dtype)
        size, columns = _layout(x_TD, weight_TK, route, group)
        token_N, slots = route.permutation.token_R, route.slot_TK.shape[1]
        sent = _Parts.of(x_TD.new_empty(len(token_N), size, dtype=torch.uint8), *columns)
        rows_TD = x_TD.to(sent.rows_ND.dtype)
        torch.index_select(rows_TD, 0, token_N, out=sent.rows_ND)
        # one slot more for what is dropped
        weight = weight_TK.new_zeros(len(token_N) * slots + 1)
        weight.scatter_(0, route.slot_TK.flatten(), weight_TK.flatten())
        sent.weight_NK.copy_(weight[:-1].view(-1, slots))
        id = expert_TK.new_full((len(weight),), route.num_experts)
        id.scatter_(0, route.slot_TK.flatten(), expert_TK.flatten() % route.num_experts)
        sent.id_NK.copy_(id[:-1].view(-1, slots))
        message = group.all_to_all(sent.message, route.send_counts, route.recv_counts, "dispatch")
        received = _Parts.of(message, *columns)
        id_RK = received.id_NK.clone()
        ctx.mark_non_differentiable(id_RK)
        return received.rows_ND.to(x_TD.dtype), received.weight_NK.contiguous(), id_RK

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        route: Route = ctx.route
        grad_RD, grad_RK, _ = grads
        size, columns = _layout(grad_RD, grad_RK, route, ctx.group)
        sent = _Parts.of(grad_RD.new_empty(len(grad_RD), size, dtype=torch.uint8), *columns)
        sent.rows_ND.copy_(grad_RD)
        sent.weight_NK.copy_(grad_RK)
        sent.id_NK.zero_()
        counts = (route.recv_counts, route.send_counts)
        received = _Parts.of(
            ctx.group.all_to_all(sent.message, *counts, "dispatch backward"), *columns
        )
        x_dtype, weight_dtype = ctx.dtypes
        grad_ND = received.rows_ND.to(x_dtype).contiguous()
        keep_TP = route.permutation.keep_TK
        assert keep_TP is not None
        grad_x = sum_over_choices(grad_ND, keep_TP.to(x_dtype), route.permutation)
        grad = torch.cat([received.weight_NK.flatten(), received.weight_NK.new_zeros(1)])
        return grad_x, grad[route.slot_TK].to(weight_dtype), None, None, None


class _SumOverRanks(Function):
    """The sum of each token's rows, [N, M] -> [T, M]."""

    @staticmethod
    def forward(ctx: Any, rows_NM: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        assert permutation.keep_TK is not None
        return sum_over_choices(rows_NM, permutation.keep_TK.to(rows_NM.dtype), permutation)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.permutation.token_R), None


def check_once_per_rank(layer: ExpertLayer) -> None:
    """Refuse a layer whose tokens cannot be sent once per rank. Raises ConfigError."""
    why = None
    if not isinstance(layer, MoELayer):
        why = f"needs MoE layers, not {type(layer).__name__}"
    elif layer.padded is not None:
        why = "needs the packed exchange: padded slots are rows of the experts"
    elif layer.top_k == 1:
        why = "saves nothing where a token has one expert"
    elif type(layer.packed) is not PackedAllToAll:
        why = "works with neither overlap nor chunks nor copies for the step"
    if why is not None:
        raise ConfigError("parallel.exchange.once_per_rank", True, why, "use false")
