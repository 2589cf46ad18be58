"""Interfaces between a layer and the code that distributes it over ranks.

`distributed/` implements `DataParallelComm` and `Dispatcher` with collectives and assigns them to
each `ExpertLayer`. `NoComm` and the local dispatchers (`dispatch.py`) serve one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from dmoe.moe.routing import DispatchPlan

TokensPerExpert = Tensor | int
"""Rows of each local expert: int64 [e], or one number if all are equal (padded slots: no host
read). With one entry more, int64 [e + 1], the last rows are unused: no expert computes them, and
their results are zero (pooled slots)."""


@dataclass(frozen=True)
class RowsWithCopies:
    """Rows per expert of a rank that has copies: first those of its own experts."""

    own_e: Tensor
    """int64: rows of each local expert."""
    copied_n: Tensor
    """int64: rows of each copy."""
    num_own: int
    """Rows of the local experts."""
    send: Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]
    """Takes the stacks of the local experts; returns them, and those of the copies [n, ...]. With a
    gradient: what the copies get is added to the experts that they are copies of."""


RowCounts = TokensPerExpert | RowsWithCopies
"""What a dispatcher may return."""


class DataParallelComm(Protocol):
    """Reductions over all data-parallel ranks, without gradient."""

    size: int
    rank: int
    averages: bool
    """Whether a loss is the mean over the ranks, as in a training loop of one's own, not a sum."""

    def sum(self, value: Tensor) -> Tensor:
        """Return `value` summed over the ranks. One all-reduce."""
        ...

    def gather(self, value: Tensor) -> Tensor:
        """Return every rank's `value`, [size, ...]; shapes must be equal. One all-gather."""
        ...


class NoComm:
    """`DataParallelComm` of a single rank: every sum is the value itself."""

    size = 1
    rank = 0
    averages = False

    def sum(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather(self, value: Tensor) -> Tensor:
        return value.detach().unsqueeze(0)


class Dispatcher(Protocol):
    """Moves token rows to their experts and back."""

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, RowCounts, Any]:
        """Return rows_RD grouped by local expert, rows per expert, and `combine`'s metadata."""
        ...

    def combine(self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        """Return y_TD on the source rank: the weighted sum over each token's kept assignments."""
        ...


class Arrived(NamedTuple):
    """Rows that have arrived at their experts (`OverlappingDispatcher`)."""

    rows_RD: Tensor
    row_counts: RowCounts
    metadata: Any
    """For `start_combine`."""
    send_gradient: Callable[[Tensor], None]
    """Start to send the gradient of `rows_RD` back, before the backward that computes it ends."""


class OverlappingDispatcher:
    """A `Dispatcher` whose exchanges can run beside other work: started, then waited for."""

    def start_dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Callable[[], Arrived]:
        """Start `dispatch`. The result waits for the rows."""
        raise NotImplementedError

    def start_combine(
        self, rows_RD: Tensor, weight_TK: Tensor, metadata: Any
    ) -> Callable[[], Tensor]:
        """Start `combine`. The result waits for the rows and returns their sums."""
        raise NotImplementedError


def depth_of(cls: type, name: str) -> int:
    """Return how many classes are asked for an attribute before the one that defines it."""
    mro = cls.__mro__
    return next((n for n, base in enumerate(mro) if name in base.__dict__), len(mro))


class SentRows(NamedTuple):
    """Rows on the ranks of their experts, in the order of arrival (`RowDispatcher`)."""

    rows_RD: Tensor
    order_R: Tensor
    """int64: the places in `rows_RD` of the rows grouped by local expert."""
    tokens_per_expert: TokensPerExpert
    metadata: Any
    """For `return_rows`."""


class RowDispatcher:
    """A `Dispatcher` whose rows need not be grouped by expert, where experts gather their own.

    `dispatch` and `combine`, which it has too, are these two and a pass over all rows each, forward
    and backward.
    """

    sends_rows = True
    """False: `dispatch` or `combine` has been overridden alone, and must be called."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "sends_rows" not in cls.__dict__:
            grouped = min(depth_of(cls, "dispatch"), depth_of(cls, "combine"))
            unsorted = max(depth_of(cls, "send_rows"), depth_of(cls, "return_rows"))
            cls.sends_rows = unsorted <= grouped

    def send_rows(self, x_TD: Tensor, plan: DispatchPlan) -> SentRows:
        """Send each token's rows to the ranks of its experts."""
        raise NotImplementedError

    def return_rows(self, rows_RM: Tensor, weight_TK: Tensor, metadata: Any) -> Tensor:
        """Return rows in the order of arrival, and sum each token's with their weights, y_TM."""
        raise NotImplementedError


class SentTokens(NamedTuple):
    """Tokens on the ranks of their experts (`TokenDispatcher`)."""

    x_RD: Tensor
    count_e: Tensor
    """int64: rows of each local expert."""
    tokens: Any
    """`experts.one_by_one.TokenRows`: the rows of the tokens, and the weights of their sums."""
    metadata: Any
    """For `return_sums`."""


class TokenDispatcher:
    """A `Dispatcher` that sends tokens, and returns the sums over their experts on each rank."""

    def send_tokens(self, x_TD: Tensor, plan: DispatchPlan) -> SentTokens:
        """Send each token once to each rank that has one of its experts."""
        raise NotImplementedError

    def return_sums(self, y_RM: Tensor, metadata: Any) -> Tensor:
        """Return y_TM on the source rank: the sum over the ranks of each token."""
        raise NotImplementedError


class ExpertRouter(Protocol):
    """The part of a layer's router that counts parameters and gradients need."""

    num_experts: int
    top_k: int

    def parameters(self) -> Iterator[nn.Parameter]: ...


@runtime_checkable
class ExpertLayer(Protocol):
    """A layer with experts: the MoE layer, or adapters beside a frozen module.

    Recognized by its attributes. Only the parameters and buffers of `experts` differ between
    expert-parallel ranks.
    """

    experts: nn.Module
    router: ExpertRouter
    layer: int
    """Index of the layer; names it in collective checks."""
    packed: Dispatcher
    padded: Dispatcher | None
    comm: DataParallelComm

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Shard the experts over `ep_size` ranks and keep those of `ep_rank`."""
        ...
