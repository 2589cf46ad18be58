"""The layer beside one frozen target module: route -> dispatch -> modules -> combine -> add.

    y = f(x)  plus  aggregation(modules(x or y), router(x or y))

It is the mixture layer (dmoe/moe/layer.py) with the frozen module as the shared expert. It has the
same attributes, so `distributed.expert_parallel.shard_experts` shards its modules and replaces its
dispatcher. Dropless.

Letters: T tokens, B sequences, D row width, W width of a module's output, O width of the frozen
output, Q width of the router's input, K modules per token, N = T * K.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig
from dmoe.modular.aggregation.base import Aggregation
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.routing.learned import sequence_context, sequence_mean
from dmoe.moe.capacity import dropless_plan
from dmoe.moe.dispatch import PackedLocal, expert_dtype, profiled
from dmoe.moe.inputs import context_of_rows
from dmoe.moe.interfaces import DataParallelComm, Dispatcher, NoComm
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.metrics import LayerStats, MoEOutput, layer_stats
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import (
    EMPTY_CONTEXT,
    BatchShape,
    DispatchPlan,
    Routing,
    TokenContext,
    masked,
)


class AdapterLayer(nn.Module):
    """The modules of one target. `attach` creates it; a hook calls it after the target.

    `context` holds the per-token inputs (labels, padding) of the next forward. It is set by
    `adapter_context`, or from a `TokenContext` among the model's arguments. `last_routing`,
    `last_context` and `last_shape` are those of the latest forward, for losses and statistics.
    """

    def __init__(
        self, bank: AdapterBank, router: RouterModule, aggregation: Aggregation, layer: int = 0
    ) -> None:
        """Create the layer.

        Args:
            bank: the modules.
            router: selects modules per token.
            aggregation: combines their outputs.
            layer: index of the layer; part of the key of its random numbers.
        """
        super().__init__()
        self.experts, self.router, self.aggregation, self.layer = bank, router, aggregation, layer
        self.packed: Dispatcher = PackedLocal()
        self.padded: Dispatcher | None = None
        self.comm: DataParallelComm = NoComm()
        self.virtual_ranks = 1
        """Groups of tokens that losses of level `micro_batch` treat as separate ranks."""
        self.context = EMPTY_CONTEXT
        self.last_routing: Routing | None = None
        self.last_context, self.last_shape = EMPTY_CONTEXT, BatchShape()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for `copy.deepcopy`, without the latest forward.

        A tensor that is part of an autograd graph cannot be copied.
        """
        return {**self.__dict__, "last_routing": None, "last_context": EMPTY_CONTEXT}

    def initialize(self, seed: int, std: float = 0.02) -> None:
        """Initialize bank, router and aggregation, keyed by (seed, layer)."""
        self.experts.initialize(seed, self.layer)
        self.router.initialize(seed, self.layer, std)
        self.aggregation.initialize(seed, self.layer)

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Shard the modules over `ep_size` ranks and keep those of `ep_rank`.

        Raises: ConfigError if the number of modules is not divisible by `ep_size`.
        """
        per_rank, remainder = divmod(self.experts.num_modules, ep_size)
        if remainder:
            raise ConfigError(
                "modules",
                self.experts.num_modules,
                f"must divide by the {ep_size} ranks that share them",
                f"use {(per_rank + 1) * ep_size}, or parallel.ep=1",
            )
        self.experts.shard(ep_rank * per_rank, per_rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the target's output with the modules' contribution.

        Args:
            x: input of the target, [..., S, D]; any ids for a prompt.
            y: output of the target, [..., S, O].
        """
        bank, sequences, tokens = self.experts, math.prod(y.shape[:-2]), math.prod(y.shape[:-1])
        context = self.per_token_context(sequences, tokens)
        if bank.input_kind == "sequence":
            rows_TD = y.new_ones(sequences, 1)
            router_input_TQ = mean_after_prefix(y, context, sequences, bank.num_prefix_tokens)
            context = sequence_context(context, sequences)
        else:
            rows_TD = masked(
                (x if bank.input_kind == "input" else y).flatten(0, -2), context.valid_T
            )
            router_input_TQ = rows_TD
        shape = BatchShape(sequences)
        with profiled("route"):
            routing: Routing = self.router(router_input_TQ, context, shape)
        self.last_routing, self.last_context, self.last_shape = routing, context, shape
        contribution_TW: Tensor = self.aggregation(
            self,
            rows_TD.to(expert_dtype(rows_TD)),
            router_input_TQ,
            dropless_plan(routing),
            sequences,
        )
        contribution_TW = masked(contribution_TW, context.valid_T)
        return bank.add_to_output(y, contribution_TW.to(y.dtype))

    def dispatch_and_combine(self, rows_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """See `DispatchedModules`."""
        with profiled("dispatch"):
            rows_RD, tokens_per_module, metadata = self.packed.dispatch(rows_TD, plan)
        with profiled("experts"):
            rows_RW = self.experts(rows_RD, tokens_per_module)
        with profiled("combine"):
            return self.packed.combine(rows_RW, plan.weight_TK, metadata)

    def per_choice_outputs(self, rows_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """See `DispatchedModules`.

        Each of the N choices is dispatched as a token with one choice: the same rows in the
        all-to-all, and nothing is summed.
        """
        tokens, top_k = plan.expert_TK.shape
        plan_N1 = replace(
            plan,
            expert_TK=plan.expert_TK.reshape(-1, 1),
            weight_TK=plan.weight_TK.new_ones(tokens * top_k, 1),
            keep_TK=None if plan.keep_TK is None else plan.keep_TK.reshape(-1, 1),
        )
        rows_ND = rows_TD.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
        return self.dispatch_and_combine(rows_ND, plan_N1).view(tokens, top_k, self.experts.width)

    def losses(self, balance: BalanceConfig) -> dict[str, Tensor]:
        """Return this rank's unweighted share of each load-balancing loss of the latest forward.

        Empty for a router without parameters. `switch_level=global` uses this micro-batch only and
        costs one all-reduce.
        """
        if self.last_routing is None or not any(True for _ in self.router.parameters()):
            return {}
        return auxiliary_losses(
            self.last_routing,
            balance,
            self.last_context,
            self.last_shape,
            self.comm,
            layer=self.layer,
            micro_batches=self.virtual_ranks,
        )

    def stats(self) -> LayerStats:
        """Return the counts of the latest forward. No host sync."""
        assert self.last_routing is not None, "the layer was not called: it has no counts"
        return layer_stats(self.last_routing, dropless_plan(self.last_routing))

    def per_token_context(self, sequences: int, tokens: int) -> TokenContext:
        """Return the context with one label per token; labels may be given one per sequence."""
        context = context_of_rows(
            self.context, torch.Size((sequences, tokens // max(1, sequences)))
        )
        label_T = context.label_T
        if label_T is not None and len(label_T) == sequences != tokens:
            label_T = label_T.repeat_interleave(tokens // sequences)
        return replace(context, label_T=label_T, prior_count_LE=None)


def mean_after_prefix(
    y: Tensor, context: TokenContext, sequences: int, num_prefix_tokens: int
) -> Tensor:
    """Return the mean of the frozen output of each sequence, without its prefix.

    Args:
        y: frozen output [..., S, O].
        context: `valid_T` masks padding.
        sequences: B.
        num_prefix_tokens: positions at the start of each sequence to leave out.

    Returns:
        [B, O], at least float32.
    """
    if y.shape[-2] <= num_prefix_tokens:
        raise ValueError(
            f"{y.shape[-2]} positions are too few for a prefix of {num_prefix_tokens}: "
            f"prepend {num_prefix_tokens} tokens (with_prefix_tokens)"
        )
    y_BSO = y.reshape(sequences, *y.shape[-2:])
    valid_T = context.valid_T
    if valid_T is not None:
        valid_T = valid_T.view(y_BSO.shape[:2])[:, num_prefix_tokens:].flatten()
    return sequence_mean(y_BSO[:, num_prefix_tokens:].flatten(0, 1), valid_T, sequences)


def register_hooks(model: nn.Module, name: str, target: nn.Module, layer: AdapterLayer) -> None:
    """Call `layer` after each forward of its target module."""
    hooks = _ForwardHooks(layer, name)
    handles = [target.register_forward_hook(hooks.call_layer, with_kwargs=True)]
    if target is not model:
        handles += [
            model.register_forward_pre_hook(hooks.read_context, with_kwargs=True),
            model.register_forward_hook(hooks.check_called),
        ]
    # not an attribute of the module: the handles are no part of its state
    layer.__dict__["handles"] = handles


class _ForwardHooks:
    """The hooks of one target: bound methods, so that a deep copy of the model calls its copy."""

    def __init__(self, layer: AdapterLayer, name: str) -> None:
        self.layer, self.name, self.called = layer, name, False
        self.model_context: TokenContext | None = None

    def call_layer(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        self.called = True
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        assert x is not None, f"{self.name} was called without a tensor"
        return _with_output_tensor(output, self.layer(x, _output_tensor(output, self.name)))

    def read_context(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Set the layer's context from a `TokenContext` among the model's arguments.

        It stays until the next forward, because blocks that are recomputed in the backward read it.
        """
        before = self.model_context
        self.model_context = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, TokenContext)), None
        )
        if self.model_context is not None:
            self.layer.context = self.model_context
        elif before is not None and self.layer.context is before:
            self.layer.context = EMPTY_CONTEXT

    def check_called(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raise RuntimeError if the model's forward did not call the target."""
        if not self.called:
            raise RuntimeError(
                f"the modules at {self.name} changed nothing: it was not called in a forward of "
                "the model, whose other parts may read its weight directly; attach to the "
                "submodule around it"
            )


def _output_tensor(output: Any, name: str) -> Tensor:
    y = output
    if isinstance(output, MoEOutput):
        y = output.y
    elif isinstance(output, tuple):
        y = output[0]
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name} returns a {type(output).__name__}: a target module must return a tensor, or a "
            "tuple that starts with one"
        )
    return y


def _with_output_tensor(output: Any, y: Tensor) -> Any:
    """Return the output with its tensor replaced by `y`."""
    if isinstance(output, MoEOutput):
        return replace(output, y=y)
    if isinstance(output, tuple):
        kind: Any = type(output)
        return kind(y, *output[1:]) if hasattr(output, "_fields") else (y, *output[1:])
    return y
