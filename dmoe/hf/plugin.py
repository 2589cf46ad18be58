"""dmoe as expert-parallel implementation of transformers, for HF Trainer, TRL and accelerate users.

    dmoe.hf.register()
    config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="dmoe")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)

transformers shards and loads the experts, computes the router, and runs FSDP2. dmoe does what is
between the router and the experts: capacity, stable dispatch, all-to-all, combine, counts. Costs
of a layer: those of `PackedAllToAll`.

Letters: T tokens, D width, E experts of all ranks, e experts of this rank, K experts per token,
R rows that this rank's experts get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.rules.capacity import check_pool
from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.config.schema.constraints import check_type
from dmoe.distributed.all_to_all import ExpertGroup, PackedAllToAll
from dmoe.hf.moefy import check_settings
from dmoe.moe.capacity import apply_capacity, expert_capacity
from dmoe.moe.interfaces import NoComm
from dmoe.moe.metrics import LayerStats, layer_stats
from dmoe.moe.routing import BatchShape, Routing

COUNTS = "dmoe_counts"
"""Attribute of an experts module that has its `ExpertCounts`."""


class ExpertCounts:
    """Assignments of one layer on this rank since `reset`; recomputed forwards are not counted."""

    choice_E: Tensor
    """int64: assignments of each expert before any drop."""
    kept_E: Tensor
    """int64: rows that each expert computed for this rank's tokens."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.reset()

    def add(self, stats: LayerStats) -> None:
        """Add one forward. No host sync."""
        device = stats.choice_E.device
        self.choice_E = self.choice_E.to(device) + stats.choice_E
        self.kept_E = self.kept_E.to(device) + stats.kept_E

    def reset(self) -> None:
        """Start from zero."""
        self.choice_E, self.kept_E = torch.zeros((2, self.num_experts), dtype=torch.int64).unbind()


class ExpertExchange:
    """Capacity, dispatch, this rank's experts and combine of one layer; called by transformers."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, capacity: CapacityConfig) -> None:
        """Keep the experts' own forward, on local ids, before transformers replaces it."""
        self.experts, self.capacity = experts, capacity
        self.experts_forward: Callable[[Tensor, Tensor, Tensor], Tensor] = experts.forward
        self.num_experts = int(experts.num_experts) * ep_mesh.size()  # type: ignore[arg-type]
        check_pool(capacity, self.num_experts)
        self.dispatcher = PackedAllToAll(ExpertGroup(ep_mesh.get_group()))
        self.counts = ExpertCounts(self.num_experts)
        setattr(experts, COUNTS, self.counts)

    def __call__(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return y_TD, the weighted sum of the kept experts' outputs of this rank's tokens.

        Args:
            x_TD: this rank's tokens.
            expert_TK: global expert ids, by transformers' own router.
            weight_TK: combine weights.
        """
        wide = torch.promote_types(weight_TK.dtype, torch.float32)
        # only the choices and their weights are known here; capacity by score uses the weights
        score_TE = weight_TK.new_zeros(len(x_TD), self.num_experts, dtype=wide)
        score_TE = score_TE.scatter(1, expert_TK, weight_TK.detach().to(wide))
        routing = Routing(expert_TK, weight_TK.to(wide), score_TE, score_TE)
        plan = apply_capacity(routing, self.shape(expert_TK), self.capacity, NoComm())
        rows_RD, tokens_per_expert, metadata = self.dispatcher.dispatch(x_TD, plan)
        assert isinstance(tokens_per_expert, torch.Tensor), "this dispatcher makes no copies"
        y_TD = self.dispatcher.combine(
            self.run_experts(rows_RD, tokens_per_expert), plan.weight_TK, metadata
        )
        if torch._C._current_graph_task_id() == -1:  # not a recomputation within a backward
            self.counts.add(layer_stats(routing, plan))
        return y_TD

    def shape(self, expert_TK: Tensor) -> BatchShape:
        """Return the slots of a forward; the capacity is that of this rank's tokens."""
        limits, (tokens, top_k) = self.capacity, expert_TK.shape
        factor = limits.factor if self.experts.training else limits.eval_factor
        if factor is None:
            return BatchShape()
        slots = expert_capacity(factor, tokens, top_k, self.num_experts, limits.min_capacity)
        return BatchShape(capacity=slots)

    def run_experts(self, rows_RD: Tensor, count_e: Tensor) -> Tensor:
        """Call the experts of this rank on rows grouped by expert, each row with weight 1.

        Without rows one row of zeros runs, so that backward reaches every parameter of every rank:
        FSDP2 waits for it.
        """
        if len(rows_RD) == 0:
            zeros_1D = rows_RD.sum(0, keepdim=True)
            first_11 = torch.zeros((1, 1), dtype=torch.int64, device=rows_RD.device)
            return self.experts_forward(zeros_1D, first_11, zeros_1D.new_ones((1, 1)))[:0]
        expert_R = torch.arange(len(count_e), device=rows_RD.device).repeat_interleave(
            count_e, output_size=len(rows_RD)
        )
        expert_R1 = expert_R.unsqueeze(1)
        return self.experts_forward(rows_RD, expert_R1, rows_RD.new_ones(expert_R1.shape))


def register(capacity: CapacityConfig | None = None, name: str = "dmoe") -> None:
    """Register dmoe in transformers' `EPImplementationInterface`; once, before `from_pretrained`.

    Args:
        capacity: slots per expert, of each rank's tokens (`group=rank`); default dropless.
        name: value of `DistributedConfig(ep_implementation=...)`. Register several capacities
            under several names.

    Raises:
        ConfigError: transformers is missing or older than 5.23, or the capacity cannot be used.
    """
    limits = CapacityConfig() if capacity is None else capacity
    check_type("capacity", limits, CapacityConfig)
    fix = "use dmoe.moefy and dmoe.parallelize, which know the sequences and all ranks"
    if limits.group != "rank":
        allowed = "must be rank: transformers passes this rank's tokens without their sequences"
        raise ConfigError("capacity.group", limits.group, allowed, fix)
    if limits.overflow != "drop":
        allowed = "must be drop: transformers passes a token's chosen experts, not the next ones"
        raise ConfigError("capacity.overflow", limits.overflow, allowed, fix)
    check_settings(limits, BalanceConfig())
    interface, base = _interface()

    class DmoeExpertParallel(base):  # type: ignore[misc, valid-type]
        """transformers' view of `ExpertExchange`: one per experts module."""

        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            if tp_mesh.size() > 1:
                allowed = (
                    "must be 1: the ranks of a tensor-parallel group have the same batch, so each"
                    " expert would see every token twice"
                )
                fix = "use fsdp_size for these ranks"
                raise ConfigError("DistributedConfig.tp_size", tp_mesh.size(), allowed, fix)
            super().__init__(experts, ep_mesh, tp_mesh)
            self.exchange = ExpertExchange(experts, ep_mesh, limits)

        def __call__(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Any:
            return self.exchange(hidden_states, top_k_index, top_k_weights)

    interface.register(name, DmoeExpertParallel)


def expert_counts(model: nn.Module) -> dict[str, ExpertCounts]:
    """Return the counts of each layer of a model that `ep_implementation="dmoe"` runs, by name.

    They are this rank's: sum them over the ranks for those of the global batch.
    """
    modules = model.named_modules()
    return {name: getattr(m, COUNTS) for name, m in modules if COUNTS in vars(m)}


def _interface() -> tuple[Any, type]:
    """Return transformers' registry and the base class of its implementations."""
    try:
        from transformers import __version__
    except ImportError:
        fix = "pip install 'dmoe[models]'"
        raise ConfigError("transformers", "not installed", "is needed", fix) from None
    try:
        from transformers.distributed.expert_parallel import (
            EPImplementation,
            EPImplementationInterface,
        )
    except ImportError:
        allowed = "has no EPImplementationInterface, which is new in 5.23"
        fix = "upgrade it, or use dmoe.moefy and dmoe.parallelize in a training loop of your own"
        raise ConfigError("transformers", __version__, allowed, fix) from None
    return EPImplementationInterface, EPImplementation
