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

from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, MoEConfig, RouterConfig
from dmoe.moe import capacity, routers, stats
from dmoe.moe.balance import auxiliary_losses
from dmoe.moe.dispatch import Dispatcher, PackedLocal, PaddedLocal
from dmoe.moe.experts import FeedForward, MLPExperts
from dmoe.moe.peers import Alone, Peers
from dmoe.moe.routing import Routing, TokenContext
from dmoe.moe.stage import stage

__all__ = ["MoE", "MoEOutput"]

NOTHING_KNOWN = TokenContext()


@dataclass(frozen=True)
class MoEOutput:
    y: Tensor
    """[..., out_dim], in the dtype the experts computed in."""
    aux: dict[str, Tensor]
    """This rank's share of each auxiliary loss, raw (unweighted), by name; on one process, the loss itself."""
    stats: stats.LayerStats
    """Counts of what was chosen, kept and dropped."""
    routing: Routing
    """The decision, after the capacity."""


class MoE(nn.Module):
    """A sparse mixture of `num_experts` feed-forward experts, `top_k` of them a token; takes any `[..., dim]`.

    Works with no process group at all. Under expert parallelism `distributed.parallelize` swaps the dispatchers and keeps only
    this rank's experts; nothing else of the layer changes.

    Args:
        dim: width D of the input.
        expert_dim: hidden width F of one expert.
        num_experts: E, over all ranks.
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
        check_layer(num_experts, top_k, self.capacity, exchange)
        self.num_experts, self.top_k, self.layer, self.virtual_ranks = num_experts, top_k, layer, virtual_ranks
        self.router = routers.build(router or RouterConfig(), dim, num_experts, top_k, layer)
        self.experts = MLPExperts(kinds.kind, dim, expert_dim, num_experts, out_dim)
        shared_dim = kinds.shared * (kinds.shared_dim or expert_dim)
        self.shared = FeedForward(kinds.kind, dim, shared_dim, out_dim) if kinds.shared else None
        self.packed: Dispatcher = PackedLocal()
        self.padded: Dispatcher | None = PaddedLocal() if exchange == "padded" else None
        self.peers: Peers = Alone()
        self.initialize(seed)

    @classmethod
    def from_config(cls, config: MoEConfig, dim: int, *, virtual_ranks: int = 1, layer: int = 0) -> Self:
        return cls(
            dim,
            config.expert_dim,
            config.num_experts,
            config.top_k,
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
        if self.shared is not None:
            self.shared.initialize(seed, f"shared.{self.layer}", std, out_std)

    def forward(self, x: Tensor, context: TokenContext = NOTHING_KNOWN) -> MoEOutput:
        """x: [..., S, D]: sequences of S tokens, or [T, D] for one. Floating point of any width."""
        x_TD = x.flatten(0, -2)
        context = self.complete(context, math.prod(x.shape[:-2]), x_TD.shape[0])

        with stage("route"):
            chosen = self.router(x_TD, context)
            routing = capacity.limit(chosen, self.capacity, context, self.peers)
        dispatcher = self.packed if self.padded is None or routing.capacity is None else self.padded
        with stage("dispatch"):
            rows_RD, per_expert, ticket = dispatcher.dispatch(x_TD.to(expert_dtype(x_TD)), routing)
        with stage("experts"):
            rows_RM = self.experts(rows_RD, per_expert)
        with stage("combine"):
            y_TM = dispatcher.combine(rows_RM, routing.weight_TK, ticket)
        if self.shared is not None:
            y_TM = y_TM + self.shared(x_TD)

        aux = auxiliary_losses(chosen, self.balance, context, self.peers, layer=self.layer, micro_batches=self.virtual_ranks)
        seen = stats.observed(stats.measure(chosen, routing), chosen, routing, context)
        return MoEOutput(y_TM.view(*x.shape[:-1], y_TM.shape[1]), aux, seen, routing)

    def complete(self, context: TokenContext, sequences: int, tokens: int) -> TokenContext:
        """`context` with what follows from the shapes: sequences, groups, slots."""
        if tokens % self.virtual_ranks:
            raise ValueError(
                f"{tokens} tokens cannot be shared by virtual_ranks={self.virtual_ranks}: use a batch that divides by it"
            )
        groups = {"rank": self.virtual_ranks, "sequence": sequences, "global": 1}[self.capacity.group]
        factor = self.capacity.factor if self.training else self.capacity.eval_factor
        if factor is None:
            return replace(context, sequences=sequences, groups=groups, capacity=None)
        sharing = tokens * self.peers.size if self.capacity.group == "global" else tokens // max(1, groups)
        slots = capacity.slots_per_expert(factor, sharing, self.top_k, self.num_experts, self.capacity.min_capacity)
        return replace(context, sequences=sequences, groups=groups, capacity=slots)


def expert_dtype(x: Tensor) -> torch.dtype:
    """What the experts compute in, and so what travels: autocast's dtype where it is on, else the input's own."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta knows no autocast
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def check_layer(num_experts: int, top_k: int, limits: CapacityConfig, exchange: str) -> None:
    """Raise ValueError for what a layer cannot mean; what a router cannot mean, `routers.build` refuses."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must be between 1 and num_experts={num_experts}")
    if exchange not in ("packed", "padded"):
        raise ValueError(f"exchange={exchange!r}: must be packed or padded")
    if exchange == "padded" and limits.factor is None:
        raise ValueError("exchange='padded' sends a fixed number of slots, so it needs capacity.factor, e.g. 1.25")
