"""Everything two steps of training produce, as one flat dictionary of arrays.

Keys: `initial/NAME`; `slots/a/l` and `kept/a/l` (accumulation step a, MoE layer l), of this rank's tokens only; and, of the global
batch, `counts`, `modules/p` (counts of place p with modules), `loss`, `aux/NAME`, `gradient/NAME`, `norm`, `clip`, `bias/l`,
`final/NAME`. On demand, of both steps s, what the decisions were made from: `score/s/a/l` and the others of `decisions.py`.
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
from dmoe.train.step import Batch, training_batches
from dmoe.train.engine import Engine
from dmoe.train.optim import learning_rate
from dmoe.train.step import compute_gradients, forward, update
from dmoe.verify.decisions import computed, recorded, witness
from dmoe.verify.naive.modular import domains

Capture = dict[str, NDArray[np.generic]]
STEPS = 2
LABELS = 3


def capture(engine: Engine, *, scores: bool = False) -> Capture:
    """Train two steps and tell what happened; gradients, losses and routing are those of the first. Collective.

    `scores`: tell also what every decision of both steps was made from.
    """
    found: Capture = {f"initial/{name}": array for name, array in _weights(engine).items()}
    data, labels = engine.task.open_data(), domains(engine.config, LABELS)
    for step in range(STEPS):
        batches = [_labelled(batch, labels) for batch in training_batches(data.train, engine, step)]
        if step == 0 or scores:
            found |= _routing(engine, batches, step, scores)
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
            found["counts"] = np.array([[layer.choice_counts, layer.kept_counts] for layer in totals.layers])
            for place, seen in enumerate(totals.modules):
                found[f"modules/{place}"] = np.array([seen.choice_counts, seen.kept_counts])
                found |= {
                    f"aux/modules/{place}/{name}": np.array(value)
                    for name, value in seen.aux.items()
                }
            for name in totals.layers[0].aux if totals.layers else ():
                found[f"aux/{name}"] = np.array([layer.aux[name] for layer in totals.layers])
    for layer in engine.model.moe_layers():
        bias = dict(layer.router.named_buffers()).get("bias_E")
        if bias is not None:
            found[f"bias/{layer.layer}"] = bias.detach().numpy().copy()
    return found | {f"final/{name}": array for name, array in state_arrays(engine).items()}


def _labelled(batch: Batch, count: int) -> Batch:
    """Synthetic text has one domain; fixed routing needs several, by sequence, on any number of ranks alike."""
    sequences = torch.arange(batch.first_sequence, batch.first_sequence + len(batch.input))
    return replace(batch, label_B=sequences % count)


def state_arrays(engine: Engine) -> Capture:
    """Weights, Adam's moments and step counts, and the routers' biases, whole, by name."""
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
    buffers = gather_full(
        dict(engine.model.named_buffers()), expert_buffers(engine.model), mesh
    )
    steps = {
        n: engine.optimizer.state[p]["step"]
        for n, p in named.items()
        if "step" in engine.optimizer.state.get(p, {})
    }
    if steps:  # all of them, or none
        count = {name: replace(location, dtype=torch.float32) for name, location in locations.items()}
        steps |= {
            name: broadcast_expert(steps.get(name), location, mesh, ())
            for name, location in count.items()
        }
    arrays |= {f"buffer.{name}": _array(value) for name, value in buffers.items()}
    return arrays | {f"step.{name}": _array(value) for name, value in steps.items()}


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


def _routing(engine: Engine, batches: list[Batch], step: int, scores: bool) -> Capture:
    """A forward without gradients in training mode: nothing is recomputed, so every layer decides exactly once."""
    found: Capture = {}
    layers = engine.model.moe_layers()
    for index, batch in enumerate(batches):
        with torch.no_grad(), recorded(layers) as (outputs, choices):
            forward(engine, batch, None)
        for n, output in enumerate(outputs):
            if step == 0:
                found[f"kept/{index}/{n}"] = computed(output.plan)
                found[f"slots/{index}/{n}"] = np.array(output.stats.slots)
            if scores:
                known = witness(
                    layers[n], output, choices[n] if choices else None, len(batch.input)
                )
                found |= {f"{what}/{step}/{index}/{n}": array for what, array in known.items()}
    return found


def _array(value: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = value.detach().cpu().numpy().copy()
    return array
