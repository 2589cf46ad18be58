"""Modules on the network as the formulas say it: one token at a time, by `contribution_reference`, routed by `naive_routing.py`.

Nothing is dispatched or grouped. Of the real layer are taken: the weights, the formula of one row (`Bank.one`, `Aggregation.one`), and
the keys of the random numbers.

Fresh modules change nothing, and what changes nothing cannot differ: `stir` gives every module small numbers, the same in every world.

Letters: T tokens (sequences, for prompts), B sequences, D width, M modules, K modules a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import LayerStats
from dmoe.moe.rng import generator
from dmoe.moe.routers.base import RouterModule
from dmoe.moe.routing import DispatchPlan, Routing, TokenContext, dropless_plan
from dmoe.train.engine import Engine
from dmoe.verify.naive.losses import auxiliary
from dmoe.verify.naive.queue import Choices
from dmoe.verify.naive.routing import decide

RANDOMIZE_SCALE = 0.05


def domains(config: Config, most: int) -> int:
    """How many domains the made-up labels may be of: `most`, or as many as a table or a router by task knows."""
    modular = config.modular
    known = len(modular.table) if modular.routing == "table" else modular.labels or most
    return min(most, known)


def randomize(engine: Engine) -> None:
    """Add small keyed numbers to the parameters of all modules and aggregations. Collective."""
    moved = {
        f"model.{name}"
        for name, _ in engine.model.named_parameters()
        if CHILD in name.split(".") and ".router." not in name
    }
    for name, value in sorted(model_state(engine.model, engine.mesh).items()):
        if name in moved:
            whole = full_tensor(value)
            drawn = torch.randn(whole.shape, generator=generator("stir", name), dtype=torch.float64)
            copy_full_into_shard(value, whole + RANDOMIZE_SCALE * drawn.to(whole))


def install(model: nn.Module) -> None:
    """Give every layer of modules the naive forward, losses and counts. One process that holds all modules."""
    for layer in adapter_layers(model).values():
        for name, method in (("forward", forward), ("losses", losses), ("stats", stats)):
            setattr(layer, name, MethodType(method, layer))


@dataclass(frozen=True)
class Decided:
    """What the layer decided in its latest forward."""

    view: View
    choices: Choices
    context: TokenContext
    sequences: int


@dataclass(frozen=True)
class View:
    """A layer of modules as `naive_routing.py` and `naive_losses.py` look at a mixture layer."""

    router: RouterModule
    training: bool
    virtual_ranks: int
    layer: int
    num_experts: int
    top_k: int
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)

    @property
    def as_layer(self) -> MoE:
        return cast(MoE, self)


def forward(layer: AdapterLayer, x: Tensor, y: Tensor) -> Tensor:
    """`y + sum_m weight[t, m] * module_m(x_t)`, or what the aggregation makes of it."""
    sequences = math.prod(y.shape[:-2])
    each = y.shape[-2]
    label_T = layer.context.label_T
    bank = layer.experts
    if bank.input_kind == "sequence":
        rows_TD = torch.ones(sequences, 1, dtype=y.dtype)
        router_input_TQ = y.reshape(sequences, each, -1)[:, bank.num_prefix_tokens :].mean(1)
        label_T = None if label_T is None else label_T.view(sequences, -1)[:, 0]
    else:
        rows_TD = (x if bank.input_kind == "input" else y).flatten(0, -2)
        router_input_TQ = rows_TD
    context = replace(layer.context, label_T=label_T, prior_count_LE=None)
    choices = _decide(layer, layer.router, router_input_TQ, context, sequences)
    layer.__dict__["decided"] = Decided(_view(layer, _inner(layer.router)), choices, context, sequences)
    routing = _as_routing(choices, layer.router.top_k)
    contribution_TW = contribution_reference(
        layer, rows_TD, router_input_TQ, dropless_plan(routing), sequences
    )
    return bank.add_to_output(y, contribution_TW)


def contribution_reference(
    layer: AdapterLayer,
    rows_TD: Tensor,
    router_input_TQ: Tensor,
    plan: DispatchPlan,
    sequences: int,
) -> Tensor:
    """Compute the result [T, W] of `layer.aggregation` one token at a time."""
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
    if not any(True for _ in layer.router.parameters()):
        return {}
    decided: Decided = layer.__dict__["decided"]
    return auxiliary(
        replace(decided.view, balance=balance).as_layer, decided.choices, decided.context, decided.sequences
    )


def stats(layer: AdapterLayer) -> LayerStats:
    decided: Decided = layer.__dict__["decided"]
    counts = [0] * decided.view.num_experts
    weight = 0.0
    for t, modules in enumerate(decided.choices.experts_T):
        for m in modules:
            counts[m] += 1
            weight += float(decided.choices.weight_TE[t, m].detach())
    number = torch.tensor(counts)
    zero = torch.zeros((), dtype=torch.float64)
    return LayerStats(
        number, number, zero, torch.tensor(weight, dtype=torch.float64), torch.tensor(0), 0
    )


def _decide(
    layer: AdapterLayer, router: RouterModule, x_TD: Tensor, context: TokenContext, sequences: int
) -> Choices:
    if isinstance(router, PerSequence):
        each = len(x_TD) // sequences
        starts = x_TD.view(sequences, each, -1)[:, : router.first or each]
        context = _of_sequences(context, each)
        return _repeated(
            _decide(layer, router.router, starts.mean(1), context, sequences), each
        )
    if isinstance(router, PerTask):
        assert context.label_T is not None
        one_hot_TL = F.one_hot(context.label_T, router.labels).to(x_TD.dtype)
        return _decide(layer, router.router, one_hot_TL, context, sequences)
    if isinstance(router, ConstantRouter):
        return _given(
            x_TD,
            [(list(range(router.num_experts)), list(router.weights))] * len(x_TD),
            router.num_experts,
        )
    if isinstance(router, TableRouter):
        assert context.label_T is not None
        rows = [[m for m in router.rows[int(label)] if m >= 0] for label in context.label_T]
        return _given(x_TD, [(row, [router.weight] * len(row)) for row in rows], router.num_experts)
    return decide(_view(layer, router).as_layer, x_TD, context, sequences)


def _inner(router: RouterModule) -> RouterModule:
    return _inner(router.router) if isinstance(router, PerSequence | PerTask) else router


def _view(layer: AdapterLayer, router: RouterModule) -> View:
    return View(
        router, layer.training, layer.virtual_ranks, layer.layer, router.num_experts, router.top_k
    )


def _of_sequences(context: TokenContext, each: int) -> TokenContext:
    label_T = context.label_T
    return replace(context, label_T=None if label_T is None else label_T[::each])


def _repeated(of_B: Choices, each: int) -> Choices:
    """The decision of a sequence for each of its tokens."""

    def rows(value: Any) -> Any:
        if value is None:
            return None
        return (
            value.repeat_interleave(each, 0)
            if isinstance(value, Tensor)
            else [one for one in value for _ in range(each)]
        )

    names = (
        "experts_T",
        "spare_T",
        "logit_TE",
        "score_TE",
        "weight_TE",
        "valid_T",
        "clean_TE",
        "std_TE",
    )
    return replace(of_B, **{name: rows(getattr(of_B, name)) for name in names})


def _given(x_TD: Tensor, rows: list[tuple[list[int], list[float]]], modules: int) -> Choices:
    """Choices and weights that nobody learned."""
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
        [True] * len(rows),
    )


def _as_routing(choices: Choices, top_k: int) -> Routing:
    filled = [[*chosen, *[0] * (top_k - len(chosen))] for chosen in choices.experts_T]
    made = [[k < len(chosen) for k in range(top_k)] for chosen in choices.experts_T]
    expert_TK = torch.tensor(filled)
    return Routing(
        expert_TK,
        choices.weight_TE.gather(1, expert_TK),
        choices.score_TE,
        choices.logit_TE,
        selected_TK=torch.tensor(made),
    )
