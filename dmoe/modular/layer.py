"""The layer that stands beside one frozen module: route -> dispatch -> modules -> join.

    y = f(x)  joined with  aggregation(modules(x or y), router(x or y))

It is the mixture layer (dmoe/moe/layer.py) with the frozen module as the shared expert, and has the same attributes, so that
`distributed.parallelize.shard_experts` shards its modules and swaps its dispatcher. Dropless.

Letters: T tokens, B sequences, D width of a row, W width of a contribution, K modules a token, N = T*K.

Balance losses of the learned routers among the modules, for who trains them. They are those of the mixture layer.
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
from dmoe.modular.aggregation.base import Aggregation, ModuleChoice, keep_mask
from dmoe.modular.aggregation.fixed import ParameterMean, sequence_weights
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.routing.learned import sequence_context, sequence_mean
from dmoe.moe.comm import DataParallelComm, NoComm
from dmoe.moe.dispatch import Dispatcher, PackedLocal
from dmoe.moe.layer import MoEOutput, expert_dtype
from dmoe.moe.load_balancing import auxiliary_losses
from dmoe.moe.metrics import LayerStats, layer_stats
from dmoe.moe.profiling import profiled
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import Routing, TokenContext

EMPTY_CONTEXT = TokenContext()


class AdapterLayer(nn.Module):
    """The modules of one place. `attach` makes it, and calls it after the frozen module.

    `context` is what is known of the tokens of the coming forward (labels, padding): set by `attach.given`, or read from the arguments
    of the model where a `TokenContext` is among them. `chosen` and `asked` are the latest routing and the context it was made in, for
    auxiliary losses and statistics.
    """

    def __init__(
        self, bank: AdapterBank, router: RouterModule, aggregation: Aggregation, layer: int = 0
    ) -> None:
        super().__init__()
        self.experts, self.router, self.aggregation, self.layer = bank, router, aggregation, layer
        self.packed: Dispatcher = PackedLocal()
        self.padded: Dispatcher | None = None
        self.comm: DataParallelComm = NoComm()
        self.virtual_ranks = 1
        """Groups of tokens that losses of level `micro_batch` treat as ranks of their own."""
        self.context = EMPTY_CONTEXT
        self.last_routing: Routing | None = None
        self.last_context = EMPTY_CONTEXT

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy`, without the latest forward: a tensor that a graph made cannot be copied."""
        return {**self.__dict__, "last_routing": None, "last_context": EMPTY_CONTEXT}

    def initialize(self, seed: int, std: float = 0.02) -> None:
        """Draw router, modules and aggregation anew, keyed by (seed, layer)."""
        self.experts.initialize(seed, self.layer)
        self.router.initialize(seed, self.layer, std)
        self.aggregation.initialize(seed, self.layer)

    def shard(self, ep_size: int, ep_rank: int) -> None:
        """Keep only the modules of one of so many ranks. Raises ConfigError where their number does not divide by it."""
        each, left = divmod(self.experts.num_modules, ep_size)
        if left:
            allowed = f"must divide by the {ep_size} ranks that share them"
            raise ConfigError(
                "modules",
                self.experts.num_modules,
                allowed,
                f"use {(each + 1) * ep_size}, or parallel.ep=1",
            )
        self.experts.shard(ep_rank * each, each)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, what the frozen module was given, [..., S, D] (any ids for a prompt); y, what it made of it, [..., S, O]."""
        sequences, tokens = math.prod(y.shape[:-2]), math.prod(y.shape[:-1])
        context = self.with_shapes(sequences, tokens)
        if self.experts.input_kind == "sequence":
            rows_TD, router_input_TQ = y.new_ones(sequences, 1), mean_after_prefix(y, context, self.experts.num_prefix_tokens)
            context = replace(sequence_context(context), sequences=sequences)
        else:
            rows_TD = (x if self.experts.input_kind == "input" else y).flatten(0, -2)
            router_input_TQ = rows_TD
        with profiled("route"):
            routing: Routing = self.router(router_input_TQ, context)
        self.last_routing, self.last_context = routing, context
        rows_TD = rows_TD.to(expert_dtype(rows_TD))
        contribution_TW: Tensor = self.aggregation(self, rows_TD, router_input_TQ, routing, sequences)
        return self.experts.add_to_output(y, contribution_TW.to(y.dtype))

    def dispatch_and_combine(self, rows_TD: Tensor, routing: Routing) -> Tensor:
        with profiled("dispatch"):
            rows_RD, tokens_per_module, ticket = self.packed.dispatch(rows_TD, routing)
        with profiled("experts"):
            rows_RW = self.experts(rows_RD, tokens_per_module)
        with profiled("combine"):
            return self.packed.combine(rows_RW, routing.weight_TK, ticket)

    def losses(self, balance: BalanceConfig) -> dict[str, Tensor]:
        """This rank's share of each loss of a learned router's latest decision, unweighted, by name; none for a given routing.

        `switch_level=global` takes this micro-batch alone, and costs one all-reduce.
        """
        if self.last_routing is None or not any(True for _ in self.router.parameters()):
            return {}
        return auxiliary_losses(
            self.last_routing,
            balance,
            self.last_context,
            self.comm,
            layer=self.layer,
            micro_batches=self.virtual_ranks,
        )

    def stats(self) -> LayerStats:
        """What the latest forward counted. No host sync."""
        assert self.last_routing is not None, "nothing was counted: the layer was not called"
        return layer_stats(self.last_routing, self.last_routing)

    def per_choice_outputs(self, rows_TD: Tensor, routing: Routing) -> Tensor:
        """Each of the N choices travels as a token with one choice of its own: the same rows on the wire, and nothing is summed."""
        tokens, top_k = routing.expert_TK.shape
        each_N1 = replace(
            routing,
            expert_TK=routing.expert_TK.reshape(-1, 1),
            weight_TK=routing.weight_TK.new_ones(tokens * top_k, 1),
            score_TE=routing.score_TE.new_zeros(1, self.experts.num_modules).expand(
                tokens * top_k, -1
            ),
            keep_TK=None if routing.keep_TK is None else routing.keep_TK.reshape(-1, 1),
        )
        rows_ND = rows_TD.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
        return self.dispatch_and_combine(rows_ND, each_N1).view(tokens, top_k, self.experts.width)

    def with_shapes(self, sequences: int, tokens: int) -> TokenContext:
        """The context with what follows from the shapes. Labels may be given one for each sequence."""
        label_T = self.context.label_T
        if label_T is not None and len(label_T) == sequences != tokens:
            label_T = label_T.repeat_interleave(tokens // sequences)
        return replace(
            self.context,
            label_T=label_T,
            prior_count_LE=None,
            sequences=sequences,
            groups=1,
            capacity=None,
        )


def mean_after_prefix(y: Tensor, context: TokenContext, num_prefix_tokens: int) -> Tensor:
    """[B, O]: the mean of the frozen output behind the first `room` positions of each sequence."""
    if y.shape[-2] <= num_prefix_tokens:
        raise ValueError(
            f"{y.shape[-2]} positions leave no room for a prompt of {num_prefix_tokens}: put {num_prefix_tokens} tokens in front (with_room)"
        )
    y_BSO = y.reshape(context.sequences, *y.shape[-2:])
    valid_T = context.valid_T
    if valid_T is not None:
        valid_T = valid_T.view(y_BSO.shape[:2])[:, num_prefix_tokens:].flatten()
    return sequence_mean(y_BSO[:, num_prefix_tokens:].flatten(0, 1), valid_T, context.sequences)


def register_hooks(model: nn.Module, name: str, place: nn.Module, layer: AdapterLayer) -> None:
    watch = _ForwardHooks(layer, name)
    handles = [place.register_forward_hook(watch.beside, with_kwargs=True)]
    if place is not model:
        handles += [
            model.register_forward_pre_hook(watch.listen, with_kwargs=True),
            model.register_forward_hook(watch.reached),
        ]
    layer.__dict__["handles"] = (
        handles  # not an attribute of the module: they are no part of its state
    )


class _ForwardHooks:
    """The hooks of one place: bound methods, so that a deep copy of the model calls the copy's modules."""

    def __init__(self, layer: AdapterLayer, name: str) -> None:
        self.layer, self.name, self.called = layer, name, False
        self.heard: TokenContext | None = None

    def beside(
        self, place: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        self.called = True
        given_x = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None
        )
        assert given_x is not None, f"{self.name} was called without a tensor"
        return _with_output_tensor(output, self.layer(given_x, _output_tensor(output, self.name)))

    def listen(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A `TokenContext` among the arguments of the model is what its modules know of the tokens.

        It stays until the next forward, because blocks that are recomputed ask for it in the backward; no longer.
        """
        before, self.heard = (
            self.heard,
            next((v for v in (*args, *kwargs.values()) if isinstance(v, TokenContext)), None),
        )
        if self.heard is not None:
            self.layer.context = self.heard
        elif before is not None and self.layer.context is before:
            self.layer.context = EMPTY_CONTEXT

    def reached(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.called:
            raise RuntimeError(
                f"the modules at {self.name} changed nothing: it was not called in a forward of the model, whose other parts may read "
                "its weight directly; attach to the submodule around it"
            )


def _output_tensor(output: Any, name: str) -> Tensor:
    y = (
        output.y
        if isinstance(output, MoEOutput)
        else output[0]
        if isinstance(output, tuple)
        else output
    )
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{name} returns a {type(output).__name__}: modules can stand beside what returns a tensor, or a tuple that starts with one"
        )
    return y


def _with_output_tensor(output: Any, y: Tensor) -> Any:
    """The output with another tensor in it."""
    if isinstance(output, MoEOutput):
        return replace(output, y=y)
    if isinstance(output, tuple):
        kind: Any = type(output)
        return kind(y, *output[1:]) if hasattr(output, "_fields") else (y, *output[1:])
    return y


def contribution_reference(
    layer: AdapterLayer, rows_TD: Tensor, router_input_TQ: Tensor, routing: Routing, sequences: int
) -> Tensor:
    """[T, W]: what `layer.aggregation` returns, given the routing."""
    each = len(rows_TD) // sequences
    totals = []
    for t in range(len(rows_TD)):
        choices = [
            ModuleChoice(k, int(routing.expert_TK[t, k]), routing.weight_TK[t, k])
            for k in range(routing.expert_TK.shape[1])
            if bool(keep_mask(routing)[t, k])
        ]
        if isinstance(layer.aggregation, ParameterMean):
            weight_BM = sequence_weights(routing, sequences, layer.experts.num_modules)
            choices = (
                [ModuleChoice(0, m, weight) for m, weight in enumerate(weight_BM[t // each])]
                if choices
                else []
            )
        if choices:
            totals.append(layer.aggregation.reference(layer.experts, rows_TD[t], router_input_TQ[t], choices))
        else:
            totals.append(rows_TD.new_zeros(layer.experts.width))
    return torch.stack(totals)
