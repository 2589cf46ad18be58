"""Records of the MoE layers during a training step: forward, backward, routing decisions.

`record_layers` hooks every layer. For step s, accumulation step a and layer l, of this rank's
tokens:

    x/s/a/l        [T, D]  input                      score/s/a/l     [T, E]  gate scores
    y/s/a/l        [T, M]  output                     chosen/s/a/l    [T, E]  selected experts
    dx/s/a/l, dy/s/a/l     gradients of both          computed/s/a/l  [T, E]  after capacity
    slots/s/a/l            slots offered              weight/s/a/l    [T, E]  combine weights
    module/s/a/n.p         [T, O]  output of adapter layer p, which runs after n MoE layers

In float32 also the inputs of each decision, from which `ties.py` separates rounding from errors:

    router_bias/...    [E]     load-balancing bias at that moment
    max_logit/...      [T]     largest absolute logit, at least 1; rounding is proportional to it
    follows_rules/...  [T]     True if the naive rules choose and keep the same from these scores

A router without learned scores (see `RouterSpec.learned`) has no close scores and no such inputs.

Letters: T tokens, D width, M output width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmoe.config.plugins import parse
from dmoe.config.router_kinds import router_spec
from dmoe.distributed.full_tensors import copy_full_into_shard, full_tensor
from dmoe.distributed.state_dict import model_state
from dmoe.hf.layer import MoefiedLayer
from dmoe.hf.model import PublishedModel
from dmoe.models.base import Model
from dmoe.modular import AdapterLayer, adapter_layers
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import MoEOutput
from dmoe.moe.routing import Routing
from dmoe.train.engine import Engine
from dmoe.verify import published
from dmoe.verify.arrays import as_array, computed_experts
from dmoe.verify.naive.capacity import Choices, apply_capacity
from dmoe.verify.naive.routing import choose_experts

Capture = dict[str, NDArray[np.generic]]


def record_model(
    model: Model, found: Capture, step: int, *, decisions: bool
) -> AbstractContextManager[None]:
    """Record the layers of a model, dmoe's own or a published one; see `record_layers`."""
    if isinstance(model, PublishedModel):
        return published.record_layers(model, found, step)
    return record_layers(model, found, step, decisions=decisions)


def named_biases(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the balance biases that a step may move, by name."""
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            yield name, buffer
    for layer in published.layers_of(model):
        if layer.balance.bias:
            yield f"layer {layer.layer}", layer.balance_bias


@contextmanager
def record_layers(model: Model, found: Capture, step: int, *, decisions: bool) -> Iterator[None]:
    """Add the records of every forward and backward inside to `found`.

    The second forward of a layer in one accumulation step is a recomputation and is not recorded.

    Args:
        model: without data parallelism.
        found: gets the records, and a naive layer's scores, by the keys of the module's docstring.
        step: optimizer step.
        decisions: record the inputs of each decision too; a collective with a shared capacity.
    """
    accumulation = [-1]
    layers = model.moe_layers()
    latest: dict[int, Routing] = {}
    finished, recorded = set[int](), set[int]()

    def count_forward(module: object, inputs: object) -> None:
        accumulation[0] += 1
        finished.clear()
        recorded.clear()

    def key(n: int) -> str:
        return f"{step}/{accumulation[0]}/{n}"

    def record_decision(n: int, module: object, inputs: object, output: Routing) -> None:
        latest[n] = output

    def record(n: int, layer: MoE, inputs: tuple[Tensor, ...], output: MoEOutput) -> None:
        if f"y/{key(n)}" not in found:
            with torch.no_grad():
                routing = latest.get(n)
                new = _layer_record(layer, inputs[0], output, routing, decisions=decisions)
            found.update({f"{name}/{key(n)}": array for name, array in new.items()})
            for name, tensor in (("dx", inputs[0]), ("dy", output.y)):
                if tensor.requires_grad:
                    _hook_gradient(tensor, found, f"{name}/{key(n)}")
        finished.add(n)

    def record_module(p: int, layer: AdapterLayer, inputs: object, output: Tensor) -> None:
        if p not in recorded:
            recorded.add(p)
            place = f"{step}/{accumulation[0]}/{len(finished)}.{p}"
            found[f"module/{place}"] = as_array(output.flatten(0, -2))

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(count_forward).remove)
        for n, layer in enumerate(layers):
            # before the hook that adds modules to the layer's output
            handle = layer.register_forward_hook(partial(record, n), prepend=True)
            stack.callback(handle.remove)
            hook: Callable[..., None] = partial(record_decision, n)
            stack.callback(layer.router.register_forward_hook(hook).remove)
        for p, adapters in enumerate(adapter_layers(model).values()):
            stack.callback(adapters.register_forward_hook(partial(record_module, p)).remove)
        yield


def _hook_gradient(tensor: Tensor, found: Capture, name: str) -> None:
    def store(gradient: Tensor) -> None:
        found[name] = as_array(gradient.flatten(0, -2))

    tensor.register_hook(store)  # type: ignore[no-untyped-call]


def tie_scores(engine: Engine) -> None:
    """Set every second row of each router to zero: logits that are 0 to the last bit. Collective.

    Equal rows would not do: a matrix product may round them differently.
    """
    modules = engine.model.named_modules()
    routers = {f"model.{name}.router.weight" for name, m in modules if isinstance(m, MoE)}
    for name, value in sorted(model_state(engine.model, engine.mesh).items()):
        if name in routers:
            full = full_tensor(value)
            full[::2] = 0.0
            copy_full_into_shard(value, full)


def _layer_record(
    layer: MoE, x: Tensor, output: MoEOutput, routing: Routing | None, *, decisions: bool
) -> Capture:
    plan = output.plan
    weight_TE = plan.weight_TK.new_zeros(plan.expert_TK.shape[0], plan.num_experts)
    kept_weight_TK = plan.weight_TK.detach().masked_fill(~plan.is_kept_TK, 0.0)
    found: Capture = {
        "x": as_array(x.flatten(0, -2)),
        "y": as_array(output.y.flatten(0, -2)),
        "chosen": computed_experts(output.routing),
        "computed": computed_experts(plan),
        "weight": as_array(weight_TE.scatter_add_(1, plan.expert_TK, kept_weight_TK)),
        "slots": np.array(output.stats.slots, np.float64),
    }
    if router_spec(layer.router.config.kind).learned:
        # those of other routers say no more than the choice, and differ for padding
        found["score"] = as_array(output.routing.score_TE)
    if decisions:
        sequences = x.shape[:-2].numel()
        found |= decision_inputs(layer, output, routing, sequences)
    return found


@contextmanager
def record_routing(layers: Sequence[MoELayer]) -> Iterator[tuple[list[Any], list[Routing]]]:
    """Record the output and the router's decision of every layer that runs inside.

    Of a published model: its `LayerRecord`.

    A naive layer calls no router, so it adds no decision.
    """
    outputs: list[Any] = []
    routings: list[Routing] = []

    def record_output(module: object, inputs: object, output: Any) -> None:
        outputs.append(module.record.layers[-1] if isinstance(module, MoefiedLayer) else output)

    def record_decision(module: object, inputs: object, output: Routing) -> None:
        routings.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record_output).remove)
            stack.callback(layer.router.register_forward_hook(record_decision).remove)
        yield outputs, routings


def decision_inputs(
    layer: MoE, output: MoEOutput, routing: Routing | None, sequences: int
) -> dict[str, NDArray[np.generic]]:
    """Return the inputs of a decision and its outcome, by the first part of their key.

    Collective (one gather of the scores) if all ranks share a capacity.

    Args:
        layer: MoE layer.
        output: of its forward.
        routing: the router's decision; None for a naive layer, which follows the rules.
        sequences: B, of this rank.
    """
    kind = layer.router.config.kind
    if not router_spec(kind).learned or parse(kind) is not None:
        return {}
    scored, computed_TE = output.routing, computed_experts(output.plan)
    naive_chosen_TE, naive_kept_TE = naive_decisions(layer, scored.score_TE, sequences)
    chosen_TE = naive_chosen_TE if routing is None else computed_experts(routing)
    same_TE = (chosen_TE == naive_chosen_TE) & (computed_TE == naive_kept_TE)
    return {
        "score": as_array(scored.score_TE),
        "router_bias": as_array(layer.router.get_buffer("bias_E")),
        "max_logit": as_array(scored.logit_TE.abs().amax(1).clamp(min=1.0)),
        "chosen": chosen_TE,
        "computed": computed_TE,
        "follows_rules": same_TE.all(1),
    }


def naive_decisions(
    layer: MoE, score_TE: Tensor, sequences: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Apply the naive rules to the layer's own scores.

    Returns:
        Experts chosen and experts kept [T, E] of this rank's tokens, given all the scores that
        share a capacity with them.
    """
    tokens, first = len(score_TE), 0
    if layer.capacity.group == "global":
        sequences, first = sequences * layer.comm.size, layer.comm.rank * tokens
        score_TE = layer.comm.gather(score_TE).flatten(0, 1)
    # the data of verify has no padding
    valid = [True] * len(score_TE)
    experts, next_experts = choose_experts(layer, score_TE, valid, sequences)
    choices = Choices(experts, next_experts, score_TE, score_TE, score_TE, valid)
    kept = apply_capacity(layer, choices, sequences)
    own = slice(first, first + tokens)
    return as_array(choices.mask(score_TE)[own]), as_array(kept.mask(score_TE)[own])
