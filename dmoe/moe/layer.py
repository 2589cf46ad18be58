"""The mixture-of-experts layer: route -> apply capacity -> dispatch -> experts -> combine.

    y_t = sum over the kept choices k of  weight[t, k] * expert[t, k](x_t)   +   shared(x_t)

Letters: T tokens on this rank in one micro-batch, D input width, M output width, F expert hidden
width, E experts, K experts per token, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import count_zero_cost
from dmoe.config.router_kinds import ROUTERS
from dmoe.config.rules import check_shapes, check_zero_cost
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, MoEConfig, RouterConfig
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.compute_usage import ComputeUsage
from dmoe.moe.dispatch import PackedLocal, PaddedLocal, profiled
from dmoe.moe.experts import FeedForward, ZeroCost, build_experts
from dmoe.moe.interfaces import DataParallelComm, Dispatcher, NoComm
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.metrics import LayerStats, layer_stats
from dmoe.moe.placement import to_physical_experts
from dmoe.moe.routers import build_router
from dmoe.moe.routing import EMPTY_CONTEXT, BatchShape, DispatchPlan, Routing, TokenContext


@dataclass(frozen=True)
class MoEOutput:
    """The result of one forward."""

    y: Tensor
    """[..., out_dim], in the dtype the experts computed in."""
    aux: dict[str, Tensor]
    """This rank's share of each auxiliary loss, unweighted, by name; on one process, the loss."""
    stats: LayerStats
    """Counts of selected, kept and dropped assignments."""
    routing: Routing
    """The router's decision, before capacity."""
    plan: DispatchPlan
    """The assignments that were computed, after capacity."""
    compute_usage: ComputeUsage | None = None
    """Experts used and cost per token, computed on request."""


class MoE(nn.Module):
    """A sparse mixture of feed-forward experts, `top_k` per token, for any [..., dim].

    Works without a process group. Under expert parallelism, `distributed.expert_parallel` replaces
    the dispatchers and keeps only this rank's experts; nothing else of the layer changes.

    Costs of a forward: those of the dispatcher in use, and one all-reduce if `balance.switch_level`
    is `global`.

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
        virtual_ranks: groups of tokens that `capacity.group=rank` and losses of level `micro_batch`
            treat as ranks of their own. The number of tokens must divide by it.
        layer: index among the MoE layers; part of the key of the initialization.
        seed: seed of the initialization; `initialize` can be called again with other values.
    """

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
        virtual_ranks: int = 1,
        layer: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        router, experts = router or RouterConfig(), experts or ExpertsConfig()
        self.capacity = capacity or CapacityConfig()
        self.balance = balance or BalanceConfig()
        self.num_zero_cost = count_zero_cost(experts)
        self.num_experts = num_experts + self.num_zero_cost
        """Experts the router selects from, zero-cost ones included."""
        check_layer(self.num_experts, top_k, self.capacity, exchange)
        check_shapes(experts, num_experts)
        check_zero_cost(experts, router, self.capacity)
        self.top_k, self.layer, self.virtual_ranks = top_k, layer, virtual_ranks
        self.router = build_router(router, dim, self.num_experts, top_k, layer)
        self.experts = build_experts(experts, dim, expert_dim, num_experts, out_dim)
        self.zero_cost = ZeroCost(experts, dim, out_dim) if self.num_zero_cost else None
        self.router.set_expert_costs((*self.experts.multiply_adds, *[0] * self.num_zero_cost))
        self.placement = self.experts.placement(1)
        self.cost_E = (*self.experts.cost, *[0.0] * self.num_zero_cost)
        zero_cost_names = self.zero_cost.names if self.zero_cost else ()
        self.names_E = (*(f"expert {e}" for e in range(num_experts)), *zero_cost_names)
        shared_dim = experts.shared * (experts.shared_dim or expert_dim)
        self.shared = (
            FeedForward(experts.kind, dim, shared_dim, out_dim) if experts.shared else None
        )
        self.packed: Dispatcher = PackedLocal()
        self.padded: Dispatcher | None = PaddedLocal() if exchange == "padded" else None
        self.comm: DataParallelComm = NoComm()
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
        """Build the layer of a config section.

        Args:
            config: section `moe`.
            dim, out_dim, virtual_ranks, layer: see the class.
        """
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
            virtual_ranks=virtual_ranks,
            layer=layer,
        )

    def initialize(self, seed: int, std: float = 0.02, out_std: float | None = None) -> None:
        """Draw all weights.

        Experts are keyed by (seed, layer, global expert id), others by (seed, name).
        """
        out_std = std if out_std is None else out_std
        self.router.initialize(seed, self.layer, std)
        self.experts.initialize(seed, self.layer, std, out_std)
        if self.zero_cost is not None:
            self.zero_cost.initialize(seed, f"zero_cost.{self.layer}", out_std)
        if self.shared is not None:
            self.shared.initialize(seed, f"shared.{self.layer}", std, out_std)

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
        x_TD = x.flatten(0, -2)
        context = self.with_budget(context, compute_budget)
        shape = self.batch_shape(math.prod(x.shape[:-2]), x_TD.shape[0])
        with profiled("route"):
            routing = self.router(x_TD, context, shape)
            plan = apply_capacity(routing, shape, self.capacity, self.comm, self.num_zero_cost)
        dispatcher = self.packed if self.padded is None or plan.slots is None else self.padded
        with profiled("dispatch"):
            rows_RD, tokens_per_expert, metadata = dispatcher.dispatch(
                x_TD.to(expert_dtype(x_TD)), to_physical_experts(plan, self.placement)
            )
        with profiled("experts"):
            rows_RM = self.experts(rows_RD, tokens_per_expert)
        with profiled("combine"):
            y_TM = dispatcher.combine(rows_RM, plan.weight_TK, metadata)
        y_TM = self.add_local_experts(y_TM, x_TD, plan)
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
            layer_stats(routing, plan, context),
            routing,
            plan,
            self.compute_usage(routing, plan, context.budget),
        )

    def add_local_experts(self, y_TM: Tensor, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Add the outputs of zero-cost and shared experts, which are never dispatched."""
        if self.zero_cost is not None:
            y_TM = self.zero_cost(y_TM, x_TD, plan)
        if self.shared is not None:
            y_TM = y_TM + self.shared(x_TD)
        return y_TM

    def compute_usage(
        self, routing: Routing, plan: DispatchPlan, budget: float | None
    ) -> ComputeUsage:
        """Return the record that computes experts used and cost per token on request."""
        bias_E = getattr(self.router, "bias_E", None)
        return ComputeUsage(
            routing, plan, self.cost_E, self.names_E, self.router.config, budget, bias_E
        )

    def with_budget(self, context: TokenContext, compute_budget: float | None) -> TokenContext:
        """Return `context` with the budget of this call: the one given, else the config's."""
        config = self.router.config
        has_budget = ROUTERS[config.kind].has_budget
        if compute_budget is None:
            return replace(context, budget=config.budget) if has_budget else context
        if not has_budget:
            raise ValueError(
                f"compute_budget={compute_budget}: router.kind={config.kind} has no budget; "
                "use router.kind=budget"
            )
        if not 0 <= compute_budget <= 1:
            raise ValueError(
                f"compute_budget={compute_budget}: must be from 0 to 1, the share of the cost of "
                "all experts"
            )
        return replace(context, budget=compute_budget)

    def batch_shape(self, sequences: int, tokens: int) -> BatchShape:
        """Return the capacity groups and slots of a forward of `tokens` tokens in `sequences`."""
        if tokens % self.virtual_ranks:
            raise ValueError(
                f"{tokens} tokens do not divide by virtual_ranks={self.virtual_ranks}: use a batch "
                "that does"
            )
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


def expert_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of experts and exchanged rows: autocast's, else the input's."""
    device = x.device.type
    # meta does not support autocast
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def check_layer(num_experts: int, top_k: int, limits: CapacityConfig, exchange: str) -> None:
    """Raise ValueError for impossible layer settings; `build_router` checks the router's.

    Args:
        num_experts: E, zero-cost experts included.
        top_k: K.
        limits: section `moe.capacity`.
        exchange: `packed` or `padded`.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be between 1 and num_experts={num_experts}")
    if exchange not in ("packed", "padded"):
        raise ValueError(f"exchange={exchange!r}: must be packed or padded")
    if exchange == "padded" and limits.factor is None:
        raise ValueError("exchange='padded' has fixed slots and needs capacity.factor, e.g. 1.25")
