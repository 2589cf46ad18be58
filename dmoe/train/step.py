"""One optimizer step: accumulate, sum, agree, clip, update.

    loss = (sum of cross-entropy over the global batch) / (its number of targets) + sum over MoE layers of coefficient * auxiliary loss

Every rank computes its share of that one number, and every gradient is summed, so no factor of W, EP or EDP appears anywhere.

Letters: L MoE layers, E experts, B sequences of this process, S sequence length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import all_reduce_sum, clip_grads_, squared_grad_norms
from dmoe.models.base import ModelOutput
from dmoe.moe.load_balancing import coefficients, updated_bias
from dmoe.moe.metrics import MetricsFn, ObservedContext, nothing_more
from dmoe.train.engine import Engine
from dmoe.train.modular.attach import moved_routers
from dmoe.train.reduction import ReducedStep, Requests, pack, unpack
from dmoe.train.step_metrics import NULL_RECORDER, NullStepRecorder

NOTHING = Requests()


@dataclass(frozen=True)
class StepResult:
    totals: ReducedStep
    """Sums over all ranks and accumulation steps: losses, squares, counts. The same on every rank."""
    grad_norm: float
    """Global norm before clipping."""
    clip_factor: float
    updated: bool
    """False if the loss or the norm was not finite, or the step was not to be taken: then no rank touched its parameters."""


def train_step(engine: Engine, batches: list[Batch], learning_rate: float) -> StepResult:
    """Take one optimizer step on this rank's micro-batches, one for each accumulation step, if its numbers are finite."""
    return update(engine, compute_gradients(engine, batches), learning_rate)


def compute_gradients(
    engine: Engine,
    batches: list[Batch],
    *,
    read_bytes: int = 0,
    requests: Requests = NOTHING,
    recorder: NullStepRecorder = NULL_RECORDER,
) -> ReducedStep:
    """Leave in every parameter's `grad` the gradient of the global batch's loss, and return what all ranks know of the step.

    Collectives beside the layers' own: the sums of dense gradients, one a parameter for experts with copies, and one control
    reduction (float64, 2 L E + small) that carries norm, losses, counts and flags; one host read of it. All ranks decide from its
    bits. `measurement`, on a step that is logged, collects what is to be told beside that.
    """
    outputs = _accumulate(engine, batches, recorder)
    engine.data_parallel.wait_for_grads()
    if engine.accelerator.scaler is not None:
        engine.accelerator.unscale_gradients(engine.optimizer)
    recorder.collect(outputs)
    vector = pack(squared_grad_norms(engine.model, engine.mesh), outputs, read_bytes, requests)
    totals = unpack(all_reduce_sum(vector, engine.mesh).tolist(), outputs[0])
    recorder.mark("other")
    return totals


def update(
    engine: Engine, totals: ReducedStep, learning_rate: float, *, take: bool = True
) -> StepResult:
    """Clip and step; or, where the loss or the norm is not finite or the step is not to be taken, do neither. The same on all ranks."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    norm, clip = grad_norm(totals), engine.config.optim.clip
    finite = math.isfinite(norm) and math.isfinite(totals.loss_sum)
    take = take and finite
    factor = clip_grads_(engine.model, norm, clip) if take and clip is not None else 1.0
    scaler = engine.accelerator.scaler
    if take or (scaler is not None and not finite):
        engine.optimizer.step()  # a scaler must see the overflow to lower its scale; it leaves the parameters alone then
    elif scaler is not None:
        scaler.update()  # it has unscaled the gradients of a step that is left out, and would refuse to do so again
    if take:
        _move_biases(engine, totals)
    engine.optimizer.zero_grad()
    return StepResult(totals, norm, factor, take)


def grad_norm(totals: ReducedStep) -> float:
    """The global gradient norm; NaN where the sum of squares is."""
    return math.sqrt(totals.squares) if totals.squares >= 0 else math.nan


def _move_biases(engine: Engine, totals: ReducedStep) -> None:
    """The bias controller, once a step, from the whole global batch's choices before any drop: equal bits on all ranks."""
    balance = engine.config.moe.balance
    if not balance.bias:
        return
    for router, seen in moved_routers(engine.model, engine.config, totals):
        bias_E = router.get_buffer("bias_E")
        count_E = torch.tensor(seen.choices, device=bias_E.device)
        bias_E.copy_(updated_bias(bias_E, count_E, balance.bias, balance.recenter))


def _accumulate(
    engine: Engine, batches: list[Batch], recorder: NullStepRecorder
) -> list[ModelOutput]:
    outputs: list[ModelOutput] = []
    prior_LE = None
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with engine.data_parallel.grad_sync(last):
            output = forward(engine, replace(batch, observer=recorder.observer), prior_LE)
            recorder.mark("forward")
            engine.accelerator.backward(_loss(output, engine, len(batches)))
            recorder.mark("backward")
        outputs.append(_detached(output))
        if engine.config.moe.balance.switch_level == "global" and not last and output.stats:
            counts_LE = all_reduce_sum(
                torch.stack([stats.choice_E for stats in output.stats]), engine.mesh
            )
            prior_LE = counts_LE if prior_LE is None else prior_LE + counts_LE
            recorder.mark("other")
    return outputs


def forward(engine: Engine, batch: Batch, prior_LE: Tensor | None) -> ModelOutput:
    """One forward of the wrapped model on this rank's micro-batch. Collective."""
    if engine.collective_checker is not None:
        engine.collective_checker.step = batch.step
    device = engine.process.device
    input, target = (
        batch.input.to(device, non_blocking=True),
        batch.target.to(device, non_blocking=True),
    )
    context = ObservedContext(
        prior_count_LE=prior_LE,
        label_T=batch.label_B.to(device).repeat_interleave(target.shape[1]),
        noise_key=(engine.config.train.seed, batch.step),
        first_sequence=batch.first_sequence,
        observer=batch.observer,
    )
    output: ModelOutput = engine.wrapped(input, target, context)
    return output


def _detached(output: ModelOutput) -> ModelOutput:
    """The same numbers without the graph: it would keep every accumulation step's activations alive."""
    assert output.loss_sum is not None
    aux = [{name: value.detach() for name, value in layer.items()} for layer in output.aux]
    modules = [
        {name: value.detach() for name, value in place.items()} for place in output.module_aux
    ]
    return ModelOutput(
        None,
        output.loss_sum.detach(),
        aux,
        output.stats,
        module_aux=modules,
        module_stats=output.module_stats,
    )


def _loss(output: ModelOutput, engine: Engine, accumulation: int) -> Tensor:
    assert output.loss_sum is not None
    loss = output.loss_sum / engine.targets
    for name, coefficient in coefficients(engine.config.moe.balance).items():
        for layer in (*output.aux, *filter(None, output.module_aux)):
            loss = loss + coefficient / accumulation * layer[name]
    return loss


@dataclass(frozen=True)
class Batch:
    """One accumulation step of this rank."""

    input: Tensor
    """[B, ...]: for a language model token ids."""
    target: Tensor
    """int64 [B, S]."""
    label_B: Tensor
    """int64: each sample's domain, for fixed routing."""
    step: int
    first_sequence: int
    """Index of the first of the B samples in the step's global batch."""
    observer: MetricsFn = nothing_more
    """What the layers are asked to tell of this forward, beside their counts."""


def training_batches(stream: Any, engine: Engine, step: int) -> list[Batch]:
    """This rank's part of optimizer step `step`, one batch for each accumulation step."""
    count, process = engine.sequences, engine.process
    firsts = [
        (a * process.world_size + process.rank) * count for a in range(engine.batching.accumulation)
    ]
    global_batch = engine.config.train.global_batch
    return [
        Batch(*engine.task.training(stream, step, first, count, global_batch), step, first)
        for first in firsts
    ]
