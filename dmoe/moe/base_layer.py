"""What all MoE layers share: capacity groups, balance bias, and the parts that ranks replace.

`MoE` (`layer.py`) is dmoe's own. A block of a published model is one too (`dmoe/hf/layer.py`): its
class is changed in place, so this class has no constructor and adds no parameter.

Letters: E experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import BalanceConfig, CapacityConfig, RouterConfig
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.constants import IndexRanges
from dmoe.moe.dispatch import permute, profiled, unpermute
from dmoe.moe.experts.base import FORWARD_TAKES
from dmoe.moe.experts.one_by_one import TokenRows
from dmoe.moe.inputs import MaskAgreement
from dmoe.moe.interfaces import DataParallelComm, Dispatcher, RowDispatcher
from dmoe.moe.kernels import kernels_on
from dmoe.moe.load_balancing import PendingCounts, updated_bias
from dmoe.moe.placement import ExpertPlacement
from dmoe.moe.routing import BatchShape, DispatchPlan, Routing, TokenContext


class MoELayer(nn.Module):
    """A layer that sends each token to some of its experts."""

    experts: Any
    router: Any
    layer: int
    """Index among the MoE layers of the model."""
    num_experts: int
    """Experts the router selects from, on all ranks, zero-cost ones included."""
    num_zero_cost: int
    top_k: int
    capacity: CapacityConfig
    balance: BalanceConfig
    virtual_ranks: int
    placement: ExpertPlacement
    cost_E: tuple[float, ...]
    """Cost of each expert as a share of that of all computed ones."""
    names_E: tuple[str, ...]
    packed: Dispatcher
    padded: Dispatcher | None
    comm: DataParallelComm
    masks: MaskAgreement
    ranges: IndexRanges
    kernels: str = "torch"
    """`moe.kernels`."""
    recompute_experts: bool = False
    """`train.recompute=experts`."""
    pending_counts: PendingCounts | None
    """None: no bias, or the trainer updates it from counts that it reduces for all layers."""

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Shard the experts over `ep_size` ranks and keep those of `ep_rank`."""
        raise NotImplementedError

    @property
    def balance_bias(self) -> Tensor:
        """The bias that the selection adds to the scores, float [E]; shares the layer's memory."""
        return self.router.get_buffer("bias_E")  # type: ignore[no-any-return]

    @property
    def weights_of_experts(self) -> tuple[int, ...]:
        """The number of weights of each computed expert of all ranks, first to last."""
        raise NotImplementedError

    def max_active_weights(self) -> int:
        """Count the weights of the experts that one token uses at most, over all ranks."""
        return sum(sorted(self.weights_of_experts, reverse=True)[: self.top_k])

    def run_experts(self, *args: Any, **named: Any) -> Tensor:
        """Call the experts; with `recompute_experts` keep their arguments alone for backward.

        Then the backward computes the experts again, but neither routes nor exchanges again.
        """
        if not (self.recompute_experts and torch.is_grad_enabled()):
            return self.experts(*args, **named)  # type: ignore[no-any-return]
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return again(self.experts, *args, **named)  # type: ignore[no-any-return]

    def sum_of_experts(self, x_TD: Tensor, count_E: Tensor, tokens: TokenRows) -> Tensor:
        """Compute the weighted sum of each token's experts, all on this rank.

        On the CPU, the experts gather their rows from the tokens.
        """
        if forward_takes(self.experts, "takes_tokens") and not x_TD.is_cuda:
            return self.run_experts(x_TD, count_E, tokens)
        rows_RM = self.run_experts(permute(x_TD, tokens.permutation), count_E)
        return unpermute(rows_RM, tokens.weight_TK, tokens.permutation)

    def takes_unsorted(self, dispatcher: RowDispatcher, x_TD: Tensor) -> bool:
        """Return whether the experts take the dispatcher's rows in the order of arrival."""
        takes_order = forward_takes(self.experts, "takes_order")
        return takes_order and dispatcher.sends_rows and not x_TD.is_cuda

    def unsorted(self, dispatcher: RowDispatcher, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Dispatch, run the experts and combine, with rows in the order of arrival.

        The same numbers as with rows grouped by expert, bit for bit; four passes over the rows into
        new memory less. On the CPU; a GPU's kernels need grouped rows.
        """
        with profiled("dispatch"):
            rows_RD, order_R, tokens_per_expert, sent = dispatcher.send_rows(x_TD, plan)
        with profiled("experts"):
            rows_RM = self.run_experts(rows_RD, tokens_per_expert, order_R=order_R)
        with profiled("combine"):
            return dispatcher.return_rows(rows_RM, plan.weight_TK, sent)

    def batch_shape(self, sequences: int, tokens: int) -> BatchShape:
        """Return the capacity groups and slots of a forward of `tokens` tokens in `sequences`."""
        if tokens % self.virtual_ranks:
            allowed = f"must divide the {tokens} tokens of the call"
            raise ConfigError("virtual_ranks", self.virtual_ranks, allowed, "use a batch that fits")
        limits = self.capacity
        groups = {"rank": self.virtual_ranks, "sequence": sequences, "global": 1}[limits.group]
        factor = limits.factor if self.training else limits.eval_factor
        if factor is None:
            return BatchShape(sequences, groups)
        tokens_per_group = (
            tokens * self.comm.size if limits.group == "global" else tokens // max(1, groups)
        )
        slots = expert_capacity(
            factor, tokens_per_group, self.top_k, self.num_experts, limits.min_capacity
        )
        return BatchShape(sequences, groups, slots)

    def plan_of(self, routing: Routing, shape: BatchShape) -> DispatchPlan:
        """Return which assignments are computed (`apply_capacity`)."""
        limits = (shape, self.capacity, self.comm, self.num_zero_cost)
        plan = apply_capacity(routing, *limits)
        kernels = kernels_on(self.kernels, plan.expert_TK)
        return replace(plan, ranges=self.ranges, kernels=kernels)

    def count_for_bias(self, y_TM: Tensor, choice_E: Tensor) -> None:
        """Count a training forward for `update_bias`, once its backward has come."""
        if self.pending_counts is not None and self.training and y_TM.requires_grad:
            # a copy: the caller may add to what the layer returns before the backward
            count_E, name = choice_E.clone(), f"MoE layer {self.layer}"
            self.pending_counts.watch(y_TM, count_E, self.parameters(), name)

    def forget_counts(self) -> None:
        """Discard what `update_bias` would count: the weights are new."""
        if self.pending_counts is not None:
            self.pending_counts = PendingCounts()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.forget_counts()

    def update_bias(self) -> None:
        """Update the balance bias (`balance.bias`); once per step, after `optimizer.step()`.

        By the assignments of the forwards whose backward has run since the last call, over all
        ranks: one all-reduce of E int64 if `comm` has several, so every rank calls it. No host sync
        and, if `balance.bias` is 0, nothing. Forgotten, the next training forward raises an error.
        """
        if self.pending_counts is not None:
            self.move_bias(self.comm.sum(self.take_counts()))

    def take_counts(self) -> Tensor:
        """Return this rank's assignments since the last update, int64 [E], and start from zero."""
        assert self.pending_counts is not None, "the layer has no balance bias to update"
        return self.pending_counts.take(self.balance_bias)

    def move_bias(self, count_E: Tensor) -> None:
        """Move the balance bias by the assignments of all ranks."""
        bias_E = self.balance_bias
        bias_E.copy_(updated_bias(bias_E, count_E, self.balance.bias, self.balance.recenter))


def forward_takes(experts: nn.Module, name: str) -> bool:
    """Return whether the experts' `forward` takes one of `FORWARD_TAKES`; it must be declared.

    Any module that takes rows and rows per expert may be a layer's experts.
    """
    assert name in FORWARD_TAKES, name
    return bool(getattr(experts, name, False))


def with_budget(
    context: TokenContext, compute_budget: float | None, config: RouterConfig
) -> TokenContext:
    """Return the context with a call's budget: the argument's, else its own, else the config's.

    Raises:
        ConfigError: a budget that is no share, or for a router that has none.
    """
    budget = context.budget if compute_budget is None else compute_budget
    if not router_spec(config.kind).has_budget:
        if budget is None:
            return context
        allowed = f"router.kind={config.kind} has no budget"
        raise ConfigError("compute_budget", budget, allowed, "use router.kind=budget")
    budget = config.budget if budget is None else budget
    if not (type(budget) in (int, float) and 0 <= budget <= 1):
        allowed = "must be from 0 to 1, the share of the cost of all experts"
        raise ConfigError("compute_budget", budget, allowed, "use 1 for no limit")
    return replace(context, budget=budget)
