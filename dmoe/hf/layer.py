"""A MoE block of transformers as a dmoe layer: its router chooses, dmoe does the rest.

    transformers: router(x) -> logits, weights, index        dmoe: capacity -> dispatch -> experts
                                                                   -> combine, counts, losses

The class of the block and of its experts is changed in place (`moefy.py`). The block's own forward
runs as before, with its router, its shared experts and its jitter; only its call of the experts
comes here. So logits and gradients are those of transformers, and the choice is to the last bit.

Letters: T tokens, D width, E experts, K experts per token, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.distributed.parallel_checks import check_parallel
from dmoe.hf.experts import expert_rows
from dmoe.hf.facts import BlockFacts, find_bias
from dmoe.hf.given_choices import given_choices
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.dispatch import expert_dtype, profiled
from dmoe.moe.experts.zero_cost import add_copies
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.metrics import LayerStats, layer_stats
from dmoe.moe.placement import to_physical_experts
from dmoe.moe.routers.base import valid_choices
from dmoe.moe.routing import EMPTY_CONTEXT, DispatchPlan, Routing, TokenContext, masked


@dataclass
class LayerRecord:
    """What one layer did in one forward."""

    aux: dict[str, Tensor]
    """This rank's share of each auxiliary loss, unweighted."""
    stats: LayerStats
    routing: Routing
    plan: DispatchPlan


@dataclass
class Forward:
    """The model's latest forward: what its layers read, and what they did."""

    context: TokenContext = EMPTY_CONTEXT
    sequences: int = 1
    running: bool = False
    """Between the start and the end of the model's forward."""
    with_gradient: bool = False
    """Whether the model's forward began with gradients enabled."""
    layers: list[LayerRecord] = field(default_factory=list)
    """One per MoE layer, in the order in which they ran."""
    begun_by: str = ""
    """Class of the model whose forward it is: a causal language model, or its base model."""

    def __deepcopy__(self, memo: object) -> Forward:
        """Return an empty record: what ran belongs to the model that was copied."""
        return Forward()

    def begin(self, context: TokenContext, sequences: int, model: nn.Module) -> None:
        """Start a forward of `sequences` equal sequences, which ends with that of `model`."""
        self.begun_by = type(model).__name__
        self.context, self.sequences, self.running = context, sequences, True
        self.with_gradient, self.layers = torch.is_grad_enabled(), []

    def add(self, index: int, layer: LayerRecord) -> None:
        """Add what the layer `index` did; outside a forward it replaces what was there."""
        if not self.running:  # a block is called alone: no forward ever empties the list
            del self.layers[index:]
        self.layers.append(layer)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return `context_fn` of a checkpoint: its recomputation has this forward's context."""
        return nullcontext(), self._again(self.context, self.sequences)

    @contextmanager
    def _again(self, context: TokenContext, sequences: int) -> Iterator[None]:
        latest = self.context, self.sequences
        self.context, self.sequences = context, sequences
        try:
            yield
        finally:
            self.context, self.sequences = latest


class MoefiedLayer(MoELayer):
    """Mixed into the class of a block: the MoE layer that its experts are called through."""

    facts: BlockFacts
    record: Forward

    @property
    def balance_bias(self) -> Tensor:
        """The bias that the router adds for the choice, float [E]; shares the model's memory.

        Zeros that nothing reads where the router has none: DeepSeek-V4's choice by token id.
        """
        bias = find_bias(self, self.facts.router, self.num_experts)
        if bias is None:
            return torch.zeros(self.num_experts, device=self.experts.down_proj.device)
        return bias.detach().view(-1)

    @property
    def weights_of_experts(self) -> tuple[int, ...]:
        """The number of weights of each expert of all ranks, biases included."""
        found: tuple[int, ...] = self.experts.multiply_adds
        return found

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Shard the experts over `ep_size` ranks and keep those of `ep_rank`."""
        self.placement = self.experts.placement(ep_size)
        self.experts.slice_experts(self.placement, ep_rank)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block's own forward, with given choices if there are any."""
        with self.replayed():
            return super().forward(*args, **kwargs)

    def replayed(self) -> AbstractContextManager[None]:
        """Return the context in which the router chooses what `moe.replay.from` gives."""
        given_LTK = self.record.context.given_expert_LTK
        given_TK = None if given_LTK is None else given_LTK[self.layer]
        return given_choices(given_TK, self.num_experts, type(self.facts.router).__name__)

    def keep_logits(self, module: nn.Module, inputs: object, output: Any) -> None:
        """Keep the router's logits until its experts are called: a forward hook of the router."""
        logits = output[0] if isinstance(output, tuple) else output
        self.__dict__["latest_logits"] = logits

    def compute_experts(
        self, experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """Compute the experts that the router has chosen, on whichever rank they are.

        Args:
            experts: the module that transformers has called.
            x_TD: its input.
            expert_TK: the router's choice.
            weight_TK: its weights.
        """
        recomputed = torch._C._current_graph_task_id() != -1  # in the backward of a checkpoint
        record = self.record
        context, sequences = EMPTY_CONTEXT, 1
        if record.running or recomputed:
            context, sequences = record.context, record.sequences
        if record.running and record.with_gradient and not torch.is_grad_enabled():
            why = "recomputes re-entrantly, where the auxiliary losses would lose their gradient"
            fix = 'use gradient_checkpointing_enable({"use_reentrant": False})'
            raise ConfigError("use_reentrant", True, why, fix)
        if self.training and torch.is_grad_enabled():
            check_parallel(self)
        if context.valid_T is not None and len(context.valid_T) != len(x_TD):
            context = replace(context, valid_T=None)
        if self.training and self.comm.size > 1 and not recomputed:
            self.masks.check(context.valid_T, x_TD, self.comm)
        expert_TK = self.choice(expert_TK, weight_TK)
        routing = self.routing(expert_TK, weight_TK, context)
        shape = self.batch_shape(sequences, len(x_TD))
        plan = self.plan_of(routing, shape)
        dispatcher = self.packed if self.padded is None or plan.slots is None else self.padded
        with profiled("dispatch"):
            rows_RD, tokens_per_expert, metadata = dispatcher.dispatch(
                x_TD.to(expert_dtype(x_TD)), to_physical_experts(plan, self.placement)
            )
        with profiled("experts"):
            rows_RD = expert_rows(experts, rows_RD, tokens_per_expert)
        with profiled("combine"):
            y_TD = dispatcher.combine(rows_RD, plan.weight_TK, metadata)
        if self.num_zero_cost:
            first = self.num_experts - self.num_zero_cost
            y_TD = add_copies(y_TD, x_TD, plan, first, self.num_zero_cost)
        y_TD = masked(y_TD, context.valid_T)
        # torch wants a recomputation to save the same tensors, so the losses are computed again
        aux = auxiliary_losses(
            routing,
            self.balance,
            context,
            shape,
            self.comm,
            layer=self.layer,
            micro_batches=self.virtual_ranks,
        )
        if not recomputed:
            stats = layer_stats(routing, plan, context)
            self.count_for_bias(y_TD, stats.choice_E)
            record.add(self.layer, LayerRecord(aux, stats, routing, plan))
        return y_TD

    def choice(self, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the router's choice as ids below E, zero-cost ones last."""
        return expert_TK

    def routing(self, expert_TK: Tensor, weight_TK: Tensor, context: TokenContext) -> Routing:
        """Return the router's decision as dmoe's record, in float32 at least."""
        logit_TE = self.__dict__.pop("latest_logits").flatten(0, -2)
        if logit_TE.shape[1] != self.num_experts:
            why = f"gives {logit_TE.shape[1]} logits for {self.num_experts} experts"
            fix = "train this model without dmoe"
            raise ConfigError("model", type(self.facts.router).__name__, why, fix)
        wide = torch.promote_types(logit_TE.dtype, torch.float32)
        logit_TE = logit_TE.to(wide)
        return Routing(
            expert_TK,
            weight_TK.to(torch.promote_types(weight_TK.dtype, wide)),
            self.facts.score(logit_TE),
            logit_TE,
            selected_TK=valid_choices(expert_TK, context),
        )
