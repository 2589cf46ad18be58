"""Adapter modules by their formulas, one token at a time, with the naive routers.

Nothing is dispatched or grouped. Only the weights, the formula of one row (`AdapterBank.reference`,
`Aggregation.reference`) and the keys of the random numbers are taken from the real layer.

Fresh modules add zero, which would hide differences: `randomize` gives the parameters of all
modules small numbers, the same for every number of ranks.

Letters: T tokens (sequences, for prompts), B sequences, D width, M modules, K modules per token,
W width of a contribution, Q width of the router's input, L labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.schema import BalanceConfig, CapacityConfig, Config
from dmoe.distributed.full_tensors import copy_full_into_shard, full_tensor
from dmoe.distributed.state_dict import model_state
from dmoe.modular import AdapterLayer, adapter_layers
from dmoe.modular.aggregation.base import ModuleChoice
from dmoe.modular.aggregation.fixed import ParameterMean, sequence_weights
from dmoe.modular.attach import CHILD
from dmoe.modular.routing import ConstantRouter, PerSequence, PerTask, TableRouter
from dmoe.moe.capacity import dropless_plan
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import LayerStats
from dmoe.moe.rng import generator
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import DispatchPlan, Routing, TokenContext
from dmoe.train.engine import Engine
from dmoe.verify.naive.capacity import Choices
from dmoe.verify.naive.layer import auxiliary_losses, without_padding
from dmoe.verify.naive.routing import route

RANDOMIZE_SCALE = 0.05
MAX_LABELS = 3


def num_labels(config: Config, maximum: int) -> int:
    """Return the number of synthetic labels: `maximum`, or fewer if the router has fewer."""
    modular = config.modular
    known = len(modular.table) if modular.routing == "table" else modular.labels or maximum
    return min(maximum, known)


def randomize(engine: Engine) -> None:
    """Add small keyed numbers to the parameters of all modules and aggregations. Collective."""
    randomized = {
        f"model.{name}"
        for name, _ in engine.model.named_parameters()
        if CHILD in name.split(".") and ".router." not in name
    }
    for name, value in sorted(model_state(engine.model, engine.mesh).items()):
        if name in randomized:
            full = full_tensor(value)
            drawn = torch.randn(full.shape, generator=generator("stir", name), dtype=torch.float64)
            copy_full_into_shard(value, full + RANDOMIZE_SCALE * drawn.to(full))


def install(model: nn.Module) -> None:
    """Replace forward, losses and statistics of every adapter layer, in one process."""
    for layer in adapter_layers(model).values():
        for name, method in (("forward", forward), ("losses", losses), ("stats", stats)):
            setattr(layer, name, MethodType(method, layer))


@dataclass(frozen=True)
class LatestRouting:
    """Routing of the latest forward of an adapter layer, for its losses and statistics."""

    layer: LayerView
    choices: Choices
    context: TokenContext
    sequences: int


@dataclass(frozen=True)
class LayerView:
    """Attributes of an MoE layer that the naive routers and losses read, for adapters."""

    router: RouterModule
    training: bool
    virtual_ranks: int
    layer: int
    num_experts: int
    top_k: int
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)

    @property
    def as_moe(self) -> MoE:
        """Return this object, typed as an MoE layer."""
        return cast(MoE, self)


def forward(layer: AdapterLayer, x: Tensor, y: Tensor) -> Tensor:
    """Compute `y + sum_m weight[t, m] * module_m(x_t)`, or another aggregation."""
    sequences = math.prod(y.shape[:-2])
    length = y.shape[-2]
    bank, context = layer.experts, replace(layer.context, prior_count_LE=None)
    if bank.input_kind == "sequence":
        rows_TD = torch.ones(sequences, 1, dtype=y.dtype)
        after_BSQ = y.reshape(sequences, length, -1)[:, bank.num_prefix_tokens :]
        router_input_TQ = _sequence_means(after_BSQ, context)
        context = _sequence_context(context, sequences)
    else:
        rows_TD = without_padding((x if bank.input_kind == "input" else y).flatten(0, -2), context)
        router_input_TQ = rows_TD
    choices = _route(layer, layer.router, router_input_TQ, context, sequences)
    view = _view(layer, _innermost(layer.router))
    layer.__dict__["latest"] = LatestRouting(view, choices, context, sequences)
    routing = _as_routing(choices, layer.router.top_k)
    contribution_TW = contribution_reference(
        layer, rows_TD, router_input_TQ, dropless_plan(routing), sequences
    )
    return bank.add_to_output(y, without_padding(contribution_TW, context))


def _sequence_means(x_BSQ: Tensor, context: TokenContext, first: int | None = None) -> Tensor:
    """Return the mean over the (first) positions of each sequence that are not padding.

    `x_BSQ` holds the last positions of the sequences.
    """
    if context.valid_T is None:
        return x_BSQ[:, :first].mean(1)
    valid_BS = context.valid_T.view(len(x_BSQ), -1)[:, -x_BSQ.shape[1] :]
    rows = zip(x_BSQ, valid_BS, strict=True)
    return torch.stack([x[v][:first].mean(0) if v.any() else 0 * x[0] for x, v in rows])


def contribution_reference(
    layer: AdapterLayer,
    rows_TD: Tensor,
    router_input_TQ: Tensor,
    plan: DispatchPlan,
    sequences: int,
) -> Tensor:
    """Compute the result of `layer.aggregation` one token at a time.

    Args:
        layer: its modules and its aggregation.
        rows_TD: input of the modules.
        router_input_TQ: for aggregations that compute weights of their own.
        plan: chosen modules and their weights.
        sequences: B.

    Returns:
        Contribution of the modules [T, W].
    """
    tokens_per_sequence = len(rows_TD) // sequences
    contributions = []
    for t in range(len(rows_TD)):
        choices = [
            ModuleChoice(k, int(plan.expert_TK[t, k]), plan.weight_TK[t, k])
            for k in range(plan.expert_TK.shape[1])
            if bool(plan.is_kept_TK[t, k])
        ]
        if choices and isinstance(layer.aggregation, ParameterMean):
            weight_M = sequence_weights(plan, sequences)[t // tokens_per_sequence]
            choices = [ModuleChoice(0, m, weight) for m, weight in enumerate(weight_M)]
        if choices:
            reference = layer.aggregation.reference
            contributions.append(reference(layer.experts, rows_TD[t], router_input_TQ[t], choices))
        else:
            contributions.append(rows_TD.new_zeros(layer.experts.width))
    return torch.stack(contributions)


def losses(layer: AdapterLayer, balance: BalanceConfig) -> dict[str, Tensor]:
    """Compute the auxiliary losses of the latest forward; none if the router learns nothing."""
    if not any(True for _ in layer.router.parameters()):
        return {}
    latest: LatestRouting = layer.__dict__["latest"]
    view = replace(latest.layer, balance=balance)
    return auxiliary_losses(view.as_moe, latest.choices, latest.context, latest.sequences)


def stats(layer: AdapterLayer) -> LayerStats:
    """Count the choices of the latest forward token by token; nothing is dropped."""
    latest: LatestRouting = layer.__dict__["latest"]
    counts = [0] * latest.layer.num_experts
    weight = 0.0
    for t, modules in enumerate(latest.choices.experts_T):
        for m in modules:
            counts[m] += 1
            weight += float(latest.choices.weight_TE[t, m].detach())
    count_M = torch.tensor(counts)
    zero = torch.zeros((), dtype=torch.float64)
    return LayerStats(
        count_M, count_M, zero, torch.tensor(weight, dtype=torch.float64), torch.tensor(0), 0
    )


def _route(
    layer: AdapterLayer, router: RouterModule, x_TD: Tensor, context: TokenContext, sequences: int
) -> Choices:
    if isinstance(router, PerSequence):
        length = len(x_TD) // sequences
        x_BSD = x_TD.view(sequences, length, -1)
        means_BD = _sequence_means(x_BSD, context, router.first)
        context = _sequence_context(context, sequences)
        choices = _route(layer, router.router, means_BD, context, sequences)
        return _repeat_for_tokens(choices, length)
    if isinstance(router, PerTask):
        assert context.label_T is not None
        one_hot_TL = F.one_hot(context.label_T, router.labels).to(x_TD.dtype)
        return _route(layer, router.router, one_hot_TL, context, sequences)
    if isinstance(router, ConstantRouter):
        return _fixed_choices(
            x_TD,
            [(list(range(router.num_experts)), list(router.weights))] * len(x_TD),
            router.num_experts,
            context,
        )
    if isinstance(router, TableRouter):
        assert context.label_T is not None
        rows = [[m for m in router.rows[int(label)] if m >= 0] for label in context.label_T]
        return _fixed_choices(
            x_TD, [(row, [router.weight] * len(row)) for row in rows], router.num_experts, context
        )
    return route(_view(layer, router).as_moe, x_TD, context, sequences)


def _innermost(router: RouterModule) -> RouterModule:
    return _innermost(router.router) if isinstance(router, PerSequence | PerTask) else router


def _view(layer: AdapterLayer, router: RouterModule) -> LayerView:
    return LayerView(
        router, layer.training, layer.virtual_ranks, layer.layer, router.num_experts, router.top_k
    )


def _sequence_context(context: TokenContext, sequences: int) -> TokenContext:
    """Return the context with one label per sequence, and which of them are real."""
    label_T, valid_T = context.label_T, context.valid_T
    return replace(
        context,
        label_T=None if label_T is None else label_T.view(sequences, -1)[:, 0],
        valid_T=None if valid_T is None else valid_T.view(sequences, -1).any(1),
    )


def _repeat_for_tokens(choices_B: Choices, length: int) -> Choices:
    """Give the choices of a sequence to each of its `length` tokens."""

    def repeated(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return value.repeat_interleave(length, 0)
        return [row for row in value for _ in range(length)]

    per_token = {f.name: getattr(choices_B, f.name) for f in fields(choices_B) if f.name != "slots"}
    return replace(choices_B, **{name: repeated(value) for name, value in per_token.items()})


def _fixed_choices(
    x_TD: Tensor, rows: list[tuple[list[int], list[float]]], modules: int, context: TokenContext
) -> Choices:
    """Return given choices and weights, without a router; none of padding."""
    valid = [True] * len(rows) if context.valid_T is None else context.valid_T.tolist()
    rows = [row if v else ([], []) for row, v in zip(rows, valid, strict=True)]
    weight_TM = torch.zeros(len(rows), modules, dtype=x_TD.dtype)
    for t, (chosen, weights) in enumerate(rows):
        weight_TM[t, chosen] = torch.tensor(weights, dtype=x_TD.dtype)
    empty: list[list[int]] = [[] for _ in rows]
    return Choices(
        [list(chosen) for chosen, _ in rows],
        empty,
        weight_TM,
        weight_TM,
        weight_TM,
        valid,
    )


def _as_routing(choices: Choices, top_k: int) -> Routing:
    """Return the choices as [T, K], padded with module 0 that is not selected."""
    padded = [[*chosen, *[0] * (top_k - len(chosen))] for chosen in choices.experts_T]
    selected = [[k < len(chosen) for k in range(top_k)] for chosen in choices.experts_T]
    expert_TK = torch.tensor(padded)
    return Routing(
        expert_TK,
        choices.weight_TE.gather(1, expert_TK),
        choices.score_TE,
        choices.logit_TE,
        selected_TK=torch.tensor(selected),
    )
