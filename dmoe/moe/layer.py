"""The mixture-of-experts layer: route -> apply capacity -> dispatch -> experts -> combine.

    y_t = sum over the kept choices k of  weight[t, k] * expert[t, k](x_t)   +   shared(x_t)

Letters: T tokens on this rank in one micro-batch, D input width, M output width, F expert hidden
width, E experts, K experts per token, R rows.
"""

from __future__ import annotations

import math
from typing import Any, Self

from torch import Tensor

from dmoe.config.expert_shapes import count_zero_cost, dense_kind
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import check_arguments
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, MoEConfig, RouterConfig
from dmoe.config.schema.constraints import check_type
from dmoe.moe.base_layer import MoELayer, forward_takes, with_budget
from dmoe.moe.chunks import ChunkingDispatcher
from dmoe.moe.compute_usage import ComputeUsage
from dmoe.moe.constants import IndexRanges
from dmoe.moe.dispatch import PackedLocal, expert_dtype, packed_permutation, profiled
from dmoe.moe.experts import FeedForward, ZeroCost, build_experts
from dmoe.moe.experts.base import Experts
from dmoe.moe.experts.dense import InSteps
from dmoe.moe.experts.one_by_one import TokenRows
from dmoe.moe.inputs import MaskAgreement
from dmoe.moe.interfaces import (
    Dispatcher,
    NoComm,
    OverlappingDispatcher,
    RowDispatcher,
    TokenDispatcher,
)
from dmoe.moe.load_balancing import PendingCounts, auxiliary_losses
from dmoe.moe.metrics import MoEOutput, layer_stats
from dmoe.moe.overlapped import in_chunks, overlapped
from dmoe.moe.padded_slots import PaddedLocal
from dmoe.moe.placement import to_physical_experts
from dmoe.moe.routers import build_router
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routers.replayed import with_given_experts
from dmoe.moe.routing import (
    EMPTY_CONTEXT,
    DispatchPlan,
    Routing,
    TokenContext,
    flatten_tokens,
    masked,
)

Shared = InSteps | None
"""The shared experts of a forward, if there are any."""


class MoE(MoELayer):
    """A sparse mixture of feed-forward experts, `top_k` per token, for any [..., dim].

    Works without a process group. Under expert parallelism, `distributed.expert_parallel` replaces
    the dispatchers and keeps only this rank's experts; nothing else of the layer changes.

    Costs of a forward: those of the dispatcher in use, and one all-reduce if `balance.switch_level`
    is `global`; in the first one of a training over several ranks another (`MaskAgreement`).

    Args:
        dim: input width D.
        expert_dim: hidden width F of one expert.
        num_experts: E over all ranks, without the zero-cost experts, which have higher ids.
        top_k: K.
        out_dim: output width M; default `dim`.
        router, capacity, balance, experts: config sections (`dmoe.config.schema`).
        exchange: `packed` moves exactly the rows there are (one host sync); `padded` moves fixed
            slots (no host sync; needs `capacity.factor`). A forward without capacity, such as
            evaluation by default, is always packed.
        kernels: `torch`, or `triton`: what moves rows, and computes activations of uniform experts,
            on a GPU. A CPU computes with torch's.
        virtual_ranks: groups of tokens that `capacity.group=rank` and losses of level `micro_batch`
            treat as ranks of their own. The number of tokens must divide by it.
        layer: index among the MoE layers; part of the key of the initialization.
        seed: seed of the initialization; `initialize` can be called again with other values.
    """

    experts: Experts
    router: RouterModule

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        num_experts: int,
        top_k: int,
        *,
        out_dim: int | None = None,
        router: RouterConfig | None = None,
        capacity: CapacityConfig | None = None,
        balance: BalanceConfig | None = None,
        experts: ExpertsConfig | None = None,
        exchange: str = "packed",
        kernels: str = "torch",
        virtual_ranks: int = 1,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        given = {"router": router, "capacity": capacity, "balance": balance, "experts": experts}
        sections: dict[str, Any] = {name: part for name, part in given.items() if part is not None}
        sections |= {"exchange": exchange, "kernels": kernels}
        config = MoEConfig(num_experts, top_k, expert_dim, **sections)
        check_arguments(
            config, dim=dim, out_dim=out_dim, virtual_ranks=virtual_ranks, layer=layer, seed=seed
        )
        self.dim, self.capacity, self.balance = dim, config.capacity, config.balance
        self.num_zero_cost = count_zero_cost(config.experts)
        self.num_experts = num_experts + self.num_zero_cost
        self.top_k, self.layer, self.virtual_ranks = top_k, layer, virtual_ranks
        self.router = build_router(config.router, dim, self.num_experts, top_k, layer)
        self.experts = build_experts(config.experts, dim, expert_dim, num_experts, out_dim)
        self.zero_cost = ZeroCost(config.experts, out_dim) if self.num_zero_cost else None
        self.router.set_expert_costs((*self.experts.multiply_adds, *[0] * self.num_zero_cost))
        self.placement = self.experts.placement(1)
        self.cost_E = (*self.experts.cost, *[0.0] * self.num_zero_cost)
        zero_cost_names = self.zero_cost.names if self.zero_cost else ()
        self.names_E = (*(f"expert {e}" for e in range(num_experts)), *zero_cost_names)
        shared_dim = config.experts.shared * (config.experts.shared_dim or expert_dim)
        kind = dense_kind(config.experts)
        self.shared = FeedForward(kind, dim, shared_dim, out_dim) if shared_dim else None
        self.packed, self.comm = PackedLocal(), NoComm()
        self.padded = PaddedLocal() if exchange == "padded" else None
        self.masks, self.ranges = MaskAgreement(), IndexRanges()
        self.kernels = self.experts.kernels = kernels
        self.pending_counts = PendingCounts() if self.balance.bias else None
        self.initialize(seed)

    @classmethod
    def from_config(
        cls,
        config: MoEConfig,
        dim: int,
        *,
        out_dim: int | None = None,
        virtual_ranks: int = 1,
        layer: int = 0,
    ) -> Self:
        """Build the layer of config section `moe`; the other arguments are those of the class."""
        check_type("config", config, MoEConfig)
        return cls(
            dim,
            config.expert_dim,
            config.num_experts,
            config.top_k,
            out_dim=out_dim,
            router=config.router,
            capacity=config.capacity,
            balance=config.balance,
            experts=config.experts,
            exchange=config.exchange,
            kernels=config.kernels,
            virtual_ranks=virtual_ranks,
            layer=layer,
        )

    def initialize(self, seed: int, std: float = 0.02, out_std: float | None = None) -> None:
        """Draw all weights.

        Experts are keyed by (seed, layer, global expert id), others by (seed, name).
        """
        out_std = std if out_std is None else out_std
        self.forget_counts()
        self.router.initialize(seed, self.layer, std)
        self.experts.initialize(seed, self.layer, std, out_std)
        if self.zero_cost is not None:
            self.zero_cost.initialize(seed, f"zero_cost.{self.layer}", out_std)
        if self.shared is not None:
            self.shared.initialize(seed, f"shared.{self.layer}", std, out_std)

    @property
    def weights_of_experts(self) -> tuple[int, ...]:
        """The number of weights of each computed expert of all ranks, first to last."""
        return self.experts.multiply_adds

    def max_active_weights(self) -> int:
        """Count the weights of the K largest experts, or what the budget allows if it is less."""
        largest, config = super().max_active_weights(), self.router.config
        if not router_spec(config.kind).has_budget:
            return largest
        return min(largest, int(config.budget * sum(self.weights_of_experts)))

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Shard the experts over `ep_size` ranks and keep those of `ep_rank`."""
        self.placement = self.experts.placement(ep_size)
        self.experts.shard(self.placement, ep_rank)

    def forward(
        self,
        x: Tensor,
        context: TokenContext = EMPTY_CONTEXT,
        *,
        compute_budget: float | None = None,
    ) -> MoEOutput:
        """Route each token to its experts and return the weighted sum of their outputs.

        Args:
            x: [..., S, D], sequences of S tokens, or [T, D] for one; any floating-point dtype.
            context: per-token inputs besides the vectors.
            compute_budget: share of the multiply-adds of all experts that a token may spend in this
                call (`router.kind=budget`).
        """
        x_TD, context = flatten_tokens(x, context, self.dim)
        context = with_budget(context, compute_budget, self.router.config)
        if self.training and self.comm.size > 1:
            self.masks.check(context.valid_T, x_TD, self.comm)
        shape = self.batch_shape(math.prod(x.shape[:-2]), x_TD.shape[0])
        with profiled("route"):
            routing = self.router(x_TD, context, shape)
            if context.given_expert_LTK is not None:
                routing = with_given_experts(routing, context, self.layer, self.router.config)
            plan = self.plan_of(routing, shape)
        dispatcher = self.packed if self.padded is None or plan.slots is None else self.padded
        shared = None if self.shared is None else InSteps(self.shared, x_TD)
        y_TM = self.dispatched(dispatcher, x_TD.to(expert_dtype(x_TD)), plan, shared)
        y_TM = masked(self.add_local_experts(y_TM, x_TD, plan, shared), context.valid_T)
        stats = layer_stats(routing, plan, context)
        self.count_for_bias(y_TM, stats.choice_E)
        return MoEOutput(
            y_TM.view(*x.shape[:-1], y_TM.shape[1]),
            auxiliary_losses(
                routing,
                self.balance,
                context,
                shape,
                self.comm,
                layer=self.layer,
                micro_batches=self.virtual_ranks,
            ),
            stats,
            routing,
            plan,
            self.compute_usage(routing, plan, context.budget),
        )

    def dispatched(
        self, dispatcher: Dispatcher, x_TD: Tensor, plan: DispatchPlan, shared: Shared
    ) -> Tensor:
        """Send the tokens to their experts and return the weighted sums of the outputs, y_TM."""
        physical = to_physical_experts(plan, self.placement)
        if isinstance(dispatcher, OverlappingDispatcher):
            return overlapped(self, dispatcher, x_TD, physical, shared)
        if isinstance(dispatcher, ChunkingDispatcher):
            return in_chunks(self, dispatcher, x_TD, physical, shared)
        takes_tokens = forward_takes(self.experts, "takes_tokens")
        if type(dispatcher) is PackedLocal and takes_tokens and not x_TD.is_cuda:
            with profiled("dispatch"):
                permutation, count_E = packed_permutation(physical)
            with profiled("experts"):
                return self.sum_of_experts(x_TD, count_E, TokenRows(permutation, plan.weight_TK))
        if isinstance(dispatcher, TokenDispatcher):
            with profiled("dispatch"):
                x_RD, count_e, tokens, sent = dispatcher.send_tokens(x_TD, physical)
            with profiled("experts"):
                y_RM = self.sum_of_experts(x_RD, count_e, tokens)
            with profiled("combine"):
                return dispatcher.return_sums(y_RM, sent)
        if isinstance(dispatcher, RowDispatcher) and self.takes_unsorted(dispatcher, x_TD):
            return self.unsorted(dispatcher, x_TD, physical)
        with profiled("dispatch"):
            rows_RD, tokens_per_expert, metadata = dispatcher.dispatch(x_TD, physical)
        with profiled("experts"):
            rows_RM = self.run_experts(rows_RD, tokens_per_expert)
        with profiled("combine"):
            return dispatcher.combine(rows_RM, plan.weight_TK, metadata)

    def add_local_experts(
        self, y_TM: Tensor, x_TD: Tensor, plan: DispatchPlan, shared: Shared = None
    ) -> Tensor:
        """Add the outputs of zero-cost and shared experts, which are never dispatched."""
        if self.zero_cost is not None:
            y_TM = self.zero_cost(y_TM, x_TD, plan)
        if self.shared is not None:
            y_TM = y_TM + (shared or InSteps(self.shared, x_TD)).result()
        return y_TM

    def compute_usage(
        self, routing: Routing, plan: DispatchPlan, budget: float | None
    ) -> ComputeUsage:
        """Return the record that computes experts used and cost per token on request."""
        bias_E, config = getattr(self.router, "bias_E", None), self.router.config
        if bias_E is not None:
            # that of this forward, which a later update does not change; else without a copy
            bias_E = bias_E.clone() if router_spec(config.kind).has_budget else None
        return ComputeUsage(routing, plan, self.cost_E, self.names_E, config, budget, bias_E)
