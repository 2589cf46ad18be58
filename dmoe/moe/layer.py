"""The mixture-of-experts layer: route -> limit -> dispatch -> experts -> combine.

    y_t = sum over the kept choices k of  weight[t, k] * expert[t, k](x_t)   +   shared(x_t)

Letters: T tokens on this rank in one micro-batch, D width, F expert hidden width, E experts, K experts a token, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import zero_cost
from dmoe.config.rules import check_shapes, check_zero_cost
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, MoEConfig, RouterConfig
from dmoe.moe import capacity, routers
from dmoe.moe import experts as kinds_of_experts
from dmoe.moe.comm import DataParallelComm, NoComm
from dmoe.moe.compute_usage import ComputeUsage
from dmoe.moe.dispatch import Dispatcher, PackedLocal, PaddedLocal
from dmoe.moe.experts import FeedForward, ZeroCost
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.metrics import LayerStats, layer_stats, observed
from dmoe.moe.placement import to_physical_experts
from dmoe.moe.profiling import profiled
from dmoe.moe.routing import Routing, TokenContext

EMPTY_CONTEXT = TokenContext()


@dataclass(frozen=True)
class MoEOutput:
    y: Tensor
    """[..., out_dim], in the dtype the experts computed in."""
    aux: dict[str, Tensor]
    """This rank's share of each auxiliary loss, raw (unweighted), by name; on one process, the loss itself."""
    stats: LayerStats
    """Counts of what was chosen, kept and dropped."""
    routing: Routing
    """The decision, after the capacity."""
    account: ComputeUsage | None = None
    """Who was used, what was spent and why, in numbers and in words."""


class MoE(nn.Module):
    """A sparse mixture of `num_experts` feed-forward experts, `top_k` of them a token; takes any `[..., dim]`.

    Works with no process group at all. Under expert parallelism `distributed.parallelize` swaps the dispatchers and keeps only
    this rank's experts; nothing else of the layer changes.

    Args:
        dim: width D of the input.
        expert_dim: hidden width F of one expert.
        num_experts: E, over all ranks; `experts.zero`, `copy` and `constant` come on top, with the ids after them.
        top_k: K.
        out_dim: width of the output; default `dim`.
        router, capacity, balance, experts: the sections of the config with the same names; see `dmoe.config.schema`.
        exchange: `packed` moves exactly the rows there are (one host sync); `padded` moves fixed slots (none; needs
            `capacity.factor`). A forward without a capacity, such as evaluation by default, is always packed.
        virtual_ranks: groups of tokens that are treated as ranks of their own by `capacity.group=rank` and by losses of level
            `micro_batch`. The batch must divide by it.
        layer: index of this layer among the MoE layers; keys its initialisation.
        seed: initialisation. `initialize` can be called again with other standard deviations.

    Costs of a forward: see the dispatcher in use; beside it one all-reduce if `balance.switch_level` is `global`.
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
        self.capacity = capacity or CapacityConfig()
        self.balance = balance or BalanceConfig()
        kinds = experts or ExpertsConfig()
        router = router or RouterConfig()
        self.num_experts = num_experts + zero_cost(kinds)
        """What the router chooses among. `experts.num_experts` are the real ones."""
        check_layer(self.num_experts, top_k, self.capacity, exchange)
        check_shapes(kinds, num_experts)
        check_zero_cost(kinds, router, self.capacity)
        self.top_k, self.layer, self.virtual_ranks = top_k, layer, virtual_ranks
        self.router = routers.build(router, dim, self.num_experts, top_k, layer)
        self.experts = kinds_of_experts.build(kinds, dim, expert_dim, num_experts, out_dim)
        self.zero_cost = ZeroCost(kinds, dim, out_dim) if zero_cost(kinds) else None
        self.num_zero_cost = zero_cost(kinds)
        self.router.set_expert_costs((*self.experts.multiply_adds, *[0] * self.num_zero_cost))
        self.placement = self.experts.placement(1)
        self.cost_E = (*self.experts.cost, *[0.0] * self.num_zero_cost)
        self.names_E = (
            *(f"expert {e}" for e in range(num_experts)),
            *(self.zero_cost.names if self.zero_cost else ()),
        )
        shared_dim = kinds.shared * (kinds.shared_dim or expert_dim)
        self.shared = FeedForward(kinds.kind, dim, shared_dim, out_dim) if kinds.shared else None
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
        """Draw all weights anew: experts keyed by (seed, layer, global expert id), the rest by (seed, name)."""
        out_std = std if out_std is None else out_std
        self.router.initialize(seed, self.layer, std)
        self.experts.initialize(seed, self.layer, std, out_std)
        if self.zero_cost is not None:
            self.zero_cost.initialize(seed, f"zero_cost.{self.layer}", out_std)
        if self.shared is not None:
            self.shared.initialize(seed, f"shared.{self.layer}", std, out_std)

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Keep only the experts of one of so many ranks, and send choices to the places where the others are."""
        self.placement = self.experts.placement(ep_size)
        self.experts.shard(self.placement, ep_rank)

    def forward(
        self,
        x: Tensor,
        context: TokenContext = EMPTY_CONTEXT,
        *,
        compute_budget: float | None = None,
    ) -> MoEOutput:
        """x: [..., S, D]: sequences of S tokens, or [T, D] for one. Floating point of any width.

        compute_budget: share of the multiply-adds of all experts that a token may spend in this call (`router.kind=budget`).
        """
        x_TD = x.flatten(0, -2)
        context = self.with_shapes(
            self.with_budget(context, compute_budget), math.prod(x.shape[:-2]), x_TD.shape[0]
        )

        with profiled("route"):
            chosen = self.router(x_TD, context)
            chosen = (
                replace(chosen, num_zero_cost=self.num_zero_cost) if self.num_zero_cost else chosen
            )
            routing = capacity.apply_capacity(chosen, self.capacity, context, self.comm)
        dispatcher = self.packed if self.padded is None or routing.capacity is None else self.padded
        with profiled("dispatch"):
            plan = to_physical_experts(routing, self.placement)
            rows_RD, tokens_per_expert, metadata = dispatcher.dispatch(
                x_TD.to(expert_dtype(x_TD)), plan
            )
        with profiled("experts"):
            rows_RM = self.experts(rows_RD, tokens_per_expert)
        with profiled("combine"):
            y_TM = dispatcher.combine(rows_RM, routing.weight_TK, metadata)
        if self.zero_cost is not None:
            y_TM = self.zero_cost(y_TM, x_TD, routing)
        if self.shared is not None:
            y_TM = y_TM + self.shared(x_TD)

        aux = auxiliary_losses(
            chosen,
            self.balance,
            context,
            self.comm,
            layer=self.layer,
            micro_batches=self.virtual_ranks,
        )
        seen = observed(layer_stats(chosen, routing), chosen, routing, context)
        bias_E = getattr(self.router, "bias_E", None)
        account = ComputeUsage(
            chosen, routing, self.cost_E, self.names_E, self.router.config, context.budget, bias_E
        )
        return MoEOutput(y_TM.view(*x.shape[:-1], y_TM.shape[1]), aux, seen, routing, account)

    def with_budget(self, context: TokenContext, compute_budget: float | None) -> TokenContext:
        """`context` with the budget of this call: the one given, else the config's."""
        config = self.router.config
        if compute_budget is None:
            return replace(context, budget=config.budget) if config.kind == "budget" else context
        if config.kind != "budget":
            raise ValueError(
                f"compute_budget={compute_budget}: router.kind={config.kind} has no budget; use router.kind=budget"
            )
        if not 0 <= compute_budget <= 1:
            raise ValueError(
                f"compute_budget={compute_budget}: must be from 0 to 1, the share of all experts' cost"
            )
        return replace(context, budget=compute_budget)

    def with_shapes(self, context: TokenContext, sequences: int, tokens: int) -> TokenContext:
        """`context` with what follows from the shapes: sequences, groups, slots."""
        if tokens % self.virtual_ranks:
            raise ValueError(
                f"{tokens} tokens cannot be shared by virtual_ranks={self.virtual_ranks}: use a batch that divides by it"
            )
        groups = {"rank": self.virtual_ranks, "sequence": sequences, "global": 1}[
            self.capacity.group
        ]
        factor = self.capacity.factor if self.training else self.capacity.eval_factor
        if factor is None:
            return replace(context, sequences=sequences, groups=groups, capacity=None)
        sharing = (
            tokens * self.comm.size if self.capacity.group == "global" else tokens // max(1, groups)
        )
        slots = capacity.expert_capacity(
            factor, sharing, self.top_k, self.num_experts, self.capacity.min_capacity
        )
        return replace(context, sequences=sequences, groups=groups, capacity=slots)


def expert_dtype(x: Tensor) -> torch.dtype:
    """What the experts compute in, and so what travels: autocast's dtype where it is on, else the input's own."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
        device
    )  # meta knows no autocast
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def check_layer(num_experts: int, top_k: int, limits: CapacityConfig, exchange: str) -> None:
    """Raise ValueError for what a layer cannot mean; what a router cannot mean, `routers.build` refuses."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be between 1 and num_experts={num_experts}")
    if exchange not in ("packed", "padded"):
        raise ValueError(f"exchange={exchange!r}: must be packed or padded")
    if exchange == "padded" and limits.factor is None:
        raise ValueError(
            "exchange='padded' sends a fixed number of slots, so it needs capacity.factor, e.g. 1.25"
        )
