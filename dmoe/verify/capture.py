"""Captures: everything that two training steps produce, as one flat dictionary of arrays.

Keys, with step s, accumulation step a, MoE layer l and adapter layer p:

    initial/NAME                                    weights before the first step
    input/s/a, target/s/a, label/s/a                of this rank's samples only
    position/s/a, valid/s/a                         the same, where documents or padding are masked
    x/s/a/l ... slots/s/a/l                         of this rank's tokens; see `decisions.py`
    counts/s/l, counts/s/modules/p                  choices and survivors of the global batch [2, E]
    loss/s, aux/s/l/NAME, norm/s, clip/s            of the global batch
    gradient/s/NAME                                 full gradients
    learning_rate/s, bias/s/NAME, weights/s/NAME    of the update; biases and weights after it

After both steps: final/NAME, and in float64 evaluation/NAME: in float32 rounding may change a
choice. `naive/step.py` and `naive/evaluation.py` make the same keys for the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmoe.config.schedule import learning_rate
from dmoe.distributed.coalesced import broadcast_experts
from dmoe.distributed.expert_parallel import expert_buffers, expert_locations, expert_parameters
from dmoe.distributed.full_tensors import gather_full, on_device_of
from dmoe.models import fusion
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.placement import ExpertPlacement
from dmoe.moe.rng import keyed_noise
from dmoe.moe.routers import base as router_base
from dmoe.moe.routers import noisy as router_noisy
from dmoe.train.engine import Engine
from dmoe.train.evaluation import evaluate
from dmoe.train.reduction import ReducedStep
from dmoe.train.routing_analysis import RoutingProbe
from dmoe.train.step import Batch, compute_gradients, training_batches, update
from dmoe.verify.arrays import as_array
from dmoe.verify.cases import NUM_STEPS
from dmoe.verify.decisions import Capture, named_biases, record_model
from dmoe.verify.differences import compare_exactly
from dmoe.verify.naive import evaluation as naive_evaluation
from dmoe.verify.naive import optimizer as naive_optimizer
from dmoe.verify.naive import step as naive_step
from dmoe.verify.naive.adapters import MAX_LABELS, num_labels

__all__ = [
    "Capture",
    "capture",
    "capture_reference",
    "final_state",
    "low_precision_state",
    "state_arrays",
]


def capture_reference(engine: Engine, *, decisions: bool = False) -> Capture:
    """Return what two steps of the naive layers and the written-out step produced."""
    found = naive_step.train(engine, decisions=decisions)
    found |= {} if decisions else naive_evaluation.evaluate(engine)
    return found | {f"final/{name}": array for name, array in state_arrays(engine).items()}


@contextmanager
def noise_from_cpu() -> Iterator[None]:
    """Draw noise on the CPU inside: a GPU's generator gives other numbers for the same key."""

    def draw_noise(draw: Any, purpose: str, x_TX: Tensor, *more: Any) -> Tensor:
        like_TX = torch.empty(x_TX.shape, dtype=x_TX.dtype)
        return keyed_noise(draw, purpose, like_TX, *more).to(x_TX.device)

    users: list[Any] = [router_base, router_noisy, fusion]
    for module in users:
        module.keyed_noise = draw_noise
    try:
        yield
    finally:
        for module in users:
            module.keyed_noise = keyed_noise


@noise_from_cpu()
def capture(engine: Engine, *, decisions: bool = False) -> Capture:
    """Train two steps and return what they produced. Collective.

    `decisions`: include the inputs of every routing decision.
    """
    found: Capture = {f"initial/{name}": array for name, array in _weights(engine).items()}
    data = engine.task.open_data()
    labels = num_labels(engine.config, MAX_LABELS)
    optim, steps = engine.config.optim, engine.config.train.steps
    found |= naive_optimizer.whole_schedule(learning_rate, optim)
    for step in range(NUM_STEPS):
        batches = [
            _with_labels(batch, labels) for batch in training_batches(data.train, engine, step)
        ]
        for a, batch in enumerate(batches):
            samples = {
                "input": batch.input,
                "target": batch.target,
                "label": batch.label_B,
                "position": batch.position_BS,
                "valid": batch.valid_BS,
            }
            found |= {
                f"{name}/{step}/{a}": as_array(value)
                for name, value in samples.items()
                if value is not None
            }
        with record_model(engine.model, found, step, decisions=decisions):
            totals = compute_gradients(engine, batches)
        found |= {f"gradient/{step}/{name}": array for name, array in _gradients(engine).items()}
        rate = learning_rate(step, steps, optim)
        updated = update(engine, totals, rate)
        _move(engine, step, totals)
        numbers = {
            "loss": totals.loss_sum,
            "norm": updated.grad_norm,
            "clip": updated.clip_factor,
            "learning_rate": _run_rate(engine),
        }
        found |= {f"{name}/{step}": np.array(float(value)) for name, value in numbers.items()}
        found |= _totals(totals, step)
        found |= {
            f"bias/{step}/{name}": as_array(value) for name, value in named_biases(engine.model)
        }
        found |= {f"weights/{step}/{name}": array for name, array in _weights(engine).items()}
    state = state_arrays(engine)
    if not decisions:
        result = evaluate(engine, data, probe=RoutingProbe(engine, data.domains))
        after = state_arrays(engine)
        changed = compare_exactly("evaluation", after, state).size
        found |= naive_evaluation.numbers(result)
        found["evaluation/changed state"] = np.array(changed)
    return found | {f"final/{name}": array for name, array in state.items()}


def _run_rate(engine: Engine) -> float:
    """Return the learning rate of the run, of which that of a group is a multiple."""
    group = engine.optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def low_precision_state(engine: Engine) -> list[str]:
    """Train one step; return the parameters, moments and biases that are not float32 after it."""
    batches = training_batches(engine.task.open_data().train, engine, 0)
    labels = num_labels(engine.config, MAX_LABELS)
    totals = compute_gradients(engine, [_with_labels(batch, labels) for batch in batches])
    update(engine, totals, engine.config.optim.lr)
    state: dict[str, Tensor] = dict(engine.model.named_parameters())
    state |= {n: b for n, b in engine.model.named_buffers() if n.endswith("bias_E")}
    for name, parameter in engine.model.named_parameters():
        moments = engine.optimizer.state.get(parameter, {})
        if engine.config.optim.moments == "bf16":
            moments = {}
        state |= {f"{m} of {name}": value for m, value in moments.items()}
    return [name for name, value in state.items() if value.dtype != torch.float32]


def _totals(totals: ReducedStep, step: int) -> Capture:
    """Return counts and auxiliary losses of every layer."""
    found: Capture = {}
    for kind, layers in (("", totals.layers), ("modules/", totals.modules)):
        for n, layer in enumerate(layers):
            counts = [layer.choice_counts, layer.kept_counts]
            found[f"counts/{step}/{kind}{n}"] = np.array(counts, np.float64)
            found |= {
                f"aux/{step}/{kind}{n}/{name}": np.array(value) for name, value in layer.aux.items()
            }
    return found


def _with_labels(batch: Batch, count: int) -> Batch:
    """Label the sequences by their place in the global batch.

    Synthetic text has one domain, and fixed routing needs several.
    """
    sequences = torch.arange(batch.first_sequence, batch.first_sequence + len(batch.input))
    return replace(batch, label_B=sequences % count)


def state_arrays(engine: Engine) -> Capture:
    """Return full weights, Adam moments, step counts and router biases by name. Collective."""
    arrays = {f"model.{name}": array for name, array in _weights(engine).items()}
    named, experts = dict(engine.model.named_parameters()), set(expert_parameters(engine.model))
    locations, mesh = expert_locations(engine.model), engine.mesh
    kinds = {m for group in engine.optimizer.param_groups for m in group.get("moments", ())}
    for moment in sorted(kinds):
        values = {
            n: on_device_of(p, engine.optimizer.state[p][moment])
            for n, p in named.items()
            if moment in engine.optimizer.state.get(p, {})
        }
        layers = {name.rpartition(".experts.")[0] for name in values}
        held = {n: loc for n, loc in locations.items() if n.rpartition(".experts.")[0] in layers}
        arrays |= {
            f"{moment}.{name}": as_array(v)
            for name, v in _in_order(gather_full(values, experts, mesh, held), engine).items()
        }
    buffers = gather_full(dict(engine.model.named_buffers()), expert_buffers(engine.model), mesh)
    buffers = _in_order(buffers, engine)
    steps = {
        n: engine.optimizer.state[p]["step"]
        for n, p in named.items()
        if "step" in engine.optimizer.state.get(p, {})
    }
    # all parameters have a step count, or none
    if steps:
        at = {name: replace(location, dtype=torch.float32) for name, location in locations.items()}
        steps |= broadcast_experts(steps, at, mesh, ())
    arrays |= {f"buffer.{name}": as_array(value) for name, value in buffers.items()}
    return arrays | {f"step.{name}": as_array(value) for name, value in steps.items()}


def final_state(capture: Capture) -> Capture:
    """Return the part of a capture that `state_arrays` returned."""
    prefix = "final/"
    return {n.removeprefix(prefix): array for n, array in capture.items() if n.startswith(prefix)}


def _weights(engine: Engine) -> Capture:
    values = dict(engine.model.named_parameters())
    return {n: as_array(v) for n, v in _gathered(values, engine).items()}


def _gradients(engine: Engine) -> Capture:
    values = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    return {n: as_array(v) for n, v in _gathered(values, engine).items()}


def _gathered(values: Mapping[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    experts, locations = set(expert_parameters(engine.model)), expert_locations(engine.model)
    return _in_order(gather_full(values, experts, engine.mesh, locations), engine)


def _in_order(full: dict[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """Return gathered tensors with the experts of those that move by their global ids."""
    if engine.placement is None:
        return full
    stacks = {*expert_parameters(engine.model), *expert_buffers(engine.model)}
    for path, layer in engine.model.named_modules():
        if isinstance(layer, MoELayer):
            ids = list(layer.placement.physical_ids.values)
            names = [n for n in stacks & full.keys() if n.startswith(f"{path}.")]
            full |= {n: full[n][ids] for n in names if len(full[n]) == len(ids)}
    return full


def _move(engine: Engine, step: int, totals: ReducedStep) -> None:
    """Move every expert by one place, whatever its load, if the config lets them move at all."""
    if engine.placement is not None:
        engine.placement.plan = _next_places
        engine.placement.after_step(step + 1, totals.kept_LE, last=False)


def _next_places(rows_E: object, placement: ExpertPlacement) -> ExpertPlacement:
    """Shift the experts by one physical id: one of each rank moves to the next rank."""
    first, *others = [expert for own in placement.experts for expert in own]
    shifted = iter([*others, first])
    return ExpertPlacement(tuple(tuple(next(shifted) for _ in own) for own in placement.experts))
