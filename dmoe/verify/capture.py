"""Captures: everything that two training steps produce, as one flat dictionary of arrays.

Keys of the first step, with accumulation step a and MoE layer l:

    initial/NAME                                    weights before the first step
    slots/a/l, kept/a/l                             of this rank's tokens only
    counts, modules/p, loss, aux/NAME, norm, clip   of the global batch; p is an adapter layer
    gradient/NAME                                   full gradients

After both steps: bias/l and final/NAME. On demand, for step s: score/s/a/l and the other keys of
`decisions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmoe.distributed.expert_parallel import expert_buffers, expert_locations, expert_parameters
from dmoe.distributed.full_tensors import broadcast_expert, gather_full
from dmoe.train.engine import Engine
from dmoe.train.engine import learning_rate
from dmoe.train.step import Batch, compute_gradients, forward, training_batches, update
from dmoe.verify.decisions import computed_experts, decision_inputs, record_routing
from dmoe.verify.naive.adapters import num_labels

Capture = dict[str, NDArray[np.generic]]
NUM_STEPS = 2
MAX_LABELS = 3


def capture(engine: Engine, *, decisions: bool = False) -> Capture:
    """Train two steps and return what they produced. Collective.

    Gradients, losses and routing are those of the first step. `decisions`: include the inputs of
    every routing decision of both steps.
    """
    found: Capture = {f"initial/{name}": array for name, array in _weights(engine).items()}
    data = engine.task.open_data()
    labels = num_labels(engine.config, MAX_LABELS)
    for step in range(NUM_STEPS):
        batches = [
            _with_labels(batch, labels) for batch in training_batches(data.train, engine, step)
        ]
        if step == 0 or decisions:
            found |= _routing(engine, batches, step, decisions)
        totals = compute_gradients(engine, batches)
        if step == 0:
            found |= {f"gradient/{name}": array for name, array in _gradients(engine).items()}
        result = update(
            engine, totals, learning_rate(step, engine.config.train.steps, engine.config.optim)
        )
        if step == 0:
            found |= {
                "loss": np.array(totals.loss_sum),
                "norm": np.array(result.grad_norm),
                "clip": np.array(result.clip_factor),
            }
            found["counts"] = np.array(
                [[layer.choice_counts, layer.kept_counts] for layer in totals.layers]
            )
            for index, layer_totals in enumerate(totals.modules):
                counts = [layer_totals.choice_counts, layer_totals.kept_counts]
                found[f"modules/{index}"] = np.array(counts)
                found |= {
                    f"aux/modules/{index}/{name}": np.array(value)
                    for name, value in layer_totals.aux.items()
                }
            for name in totals.layers[0].aux if totals.layers else ():
                found[f"aux/{name}"] = np.array([layer.aux[name] for layer in totals.layers])
    for layer in engine.model.moe_layers():
        bias = dict(layer.router.named_buffers()).get("bias_E")
        if bias is not None:
            found[f"bias/{layer.layer}"] = bias.detach().numpy().copy()
    return found | {f"final/{name}": array for name, array in state_arrays(engine).items()}


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
    for moment in ("exp_avg", "exp_avg_sq"):
        values = {
            n: engine.optimizer.state[p][moment]
            for n, p in named.items()
            if moment in engine.optimizer.state.get(p, {})
        }
        arrays |= {
            f"{moment}.{name}": _array(v)
            for name, v in gather_full(values, experts, mesh, locations).items()
        }
    buffers = gather_full(dict(engine.model.named_buffers()), expert_buffers(engine.model), mesh)
    steps = {
        n: engine.optimizer.state[p]["step"]
        for n, p in named.items()
        if "step" in engine.optimizer.state.get(p, {})
    }
    # all parameters have a step count, or none
    if steps:
        step_locations = {
            name: replace(location, dtype=torch.float32) for name, location in locations.items()
        }
        steps |= {
            name: broadcast_expert(steps.get(name), location, mesh, ())
            for name, location in step_locations.items()
        }
    arrays |= {f"buffer.{name}": _array(value) for name, value in buffers.items()}
    return arrays | {f"step.{name}": _array(value) for name, value in steps.items()}


def final_state(capture: Capture) -> Capture:
    """Return the part of a capture that `state_arrays` returned."""
    prefix = "final/"
    return {n.removeprefix(prefix): array for n, array in capture.items() if n.startswith(prefix)}


def _weights(engine: Engine) -> Capture:
    values = dict(engine.model.named_parameters())
    return {n: _array(v) for n, v in _gathered(values, engine).items()}


def _gradients(engine: Engine) -> Capture:
    values = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    return {n: _array(v) for n, v in _gathered(values, engine).items()}


def _gathered(values: Mapping[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    return gather_full(
        values, set(expert_parameters(engine.model)), engine.mesh, expert_locations(engine.model)
    )


def _routing(engine: Engine, batches: list[Batch], step: int, decisions: bool) -> Capture:
    """Capture the routing of one step by a forward without gradients in training mode.

    Nothing is recomputed, so every layer routes exactly once.
    """
    found: Capture = {}
    layers = engine.model.moe_layers()
    for index, batch in enumerate(batches):
        with torch.no_grad(), record_routing(layers) as (outputs, routings):
            forward(engine, batch, None)
        for n, output in enumerate(outputs):
            if step == 0:
                found[f"kept/{index}/{n}"] = computed_experts(output.plan)
                found[f"slots/{index}/{n}"] = np.array(output.stats.slots)
            if decisions:
                routing = routings[n] if routings else None
                inputs = decision_inputs(layers[n], output, routing, len(batch.input))
                found |= {f"{key}/{step}/{index}/{n}": array for key, array in inputs.items()}
    return found


def _array(value: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = value.detach().cpu().numpy().copy()
    return array
