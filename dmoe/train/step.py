"""One optimizer step: forward and backward per micro-batch, reduce, clip, update.

    loss = (sum of cross-entropy over the global batch) / (number of its targets)
           + sum over MoE layers of coefficient * auxiliary loss

Every rank computes its share of that one number, and every gradient is summed, so no factor of W,
EP or EDP appears anywhere.

Letters: L MoE layers, E experts, K experts per token, B sequences of this process, S sequence
length, T = B*S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import (
    all_reduce_sum,
    clip_factor,
    clip_grads_,
    decide_step,
    folds_clip,
    set_learning_rate,
    squared_grad_norms,
    start_host_copy,
    step_as_decided,
)
from dmoe.models.base import ModelOutput
from dmoe.moe.load_balancing import coefficients, updated_bias
from dmoe.moe.routing import MetricsFn, TokenContext
from dmoe.train.engine import Engine
from dmoe.train.modular.attach import balance_biases
from dmoe.train.reduction import (
    NULL_RECORDER,
    BatchCounts,
    NullStepRecorder,
    ReducedStep,
    Requests,
    count_batches,
    detached,
    pack,
    unpack,
)

NO_REQUESTS = Requests()


@dataclass(frozen=True)
class Batch:
    """One accumulation step of this rank."""

    input: Tensor
    """[B, ...]: token ids for a language model."""
    target: Tensor
    """int64 [B, S]."""
    label_B: Tensor
    """int64: domain of each sample, for fixed routing."""
    step: int
    first_sequence: int
    """Index of the first sample in the global batch of the step."""
    position_BS: Tensor | None = None
    """int64: position of each token in its document; None: each sample is one document."""
    valid_BS: Tensor | None = None
    """bool: False for padding; None: there is none."""
    metrics_fn: MetricsFn | None = None
    """Metrics that the MoE layers compute in this forward, beside their counts."""
    given_expert_LTK: Tensor | None = None
    """int64: the experts of each token in every MoE layer, if they are replayed."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, equal on all ranks."""

    totals: ReducedStep
    """Sums over all ranks and accumulation steps: losses, squared norms, counts."""
    grad_norm: float
    """Global norm before clipping."""
    clip_factor: float
    updated: bool
    """Whether the parameters were updated: loss and norm were finite, and the step was to apply."""


def training_batches(dataset: Any, engine: Engine, step: int) -> list[Batch]:
    """Return this rank's part of the global batch of a step, one batch per accumulation step.

    With W ranks and n sequences per rank, accumulation step a takes the samples `a W n` to
    `(a + 1) W n - 1`, rank by rank. So W ranks with one virtual rank each, and one rank with W
    virtual ranks, see the same micro-batches in the same token groups.
    """
    count, process = engine.sequences_per_forward, engine.process
    global_batch = engine.config.train.global_batch
    batches = []
    for index in range(engine.batching.accumulation):
        first = (index * process.world_size + process.rank) * count
        samples = engine.task.training_samples(dataset, step, first, count, global_batch)
        input, target, label_B, position_BS, valid_BS = samples
        batches.append(Batch(input, target, label_B, step, first, position_BS, valid_BS))
    return batches


def count_target_bytes(engine: Engine, data: Any, batches: Sequence[Batch]) -> int:
    """Return the bytes of text of the targets of this rank's batches."""
    return sum(int(engine.task.bytes_per_target(data, batch.target).sum()) for batch in batches)


def train_step(engine: Engine, batches: list[Batch], learning_rate: float) -> StepResult:
    """Take one optimizer step, if loss and gradient norm are finite. Collective."""
    return update(engine, compute_gradients(engine, batches), learning_rate)


def compute_gradients(
    engine: Engine,
    batches: list[Batch],
    *,
    target_bytes: int = 0,
    requests: Requests = NO_REQUESTS,
    recorder: NullStepRecorder = NULL_RECORDER,
    take_at: float | None = None,
) -> ReducedStep:
    """Compute the gradient of the global batch's loss in every parameter's `grad`. Collective.

    Collectives beside those of the layers: the reductions of dense gradients, one per parameter of
    replicated experts, and one control reduction (float64, 2 L E + small) of norms, losses, counts
    and requests, which is read once on the host. All ranks decide from its bits. One more, of one
    number, where not all targets are predicted (data.format=instruct).

    Args:
        engine: model and data parallelism.
        batches: of this rank, one per accumulation step.
        target_bytes: bytes of text of this rank's targets.
        requests: of this rank.
        recorder: collects further metrics in a step that is logged.
        take_at: learning rate of a step that is taken if it is finite. With fused AdamW the device
            then decides and updates before the host reads the sums (`taken`); `update` does the
            rest.

    Returns:
        The reduced sums, equal on all ranks.
    """
    counts = count_batches(batches, target_bytes)
    outputs = _accumulate(engine, batches, recorder, _global_targets(engine, batches, counts))
    engine.data_parallel.wait_for_grads()
    if engine.accelerator.scaler is not None:
        engine.accelerator.unscale_gradients(engine.optimizer)
    recorder.collect(outputs)
    vector = pack(squared_grad_norms(engine.model, engine.mesh), outputs, counts, requests)
    read = start_host_copy(all_reduce_sum(vector, engine.mesh))
    taken = take_at is not None and folds_clip(engine.optimizer, engine.accelerator.scaler)
    if taken:
        set_learning_rate(engine.optimizer, take_at)
        step_as_decided(engine.optimizer, decide_step(vector[:3], engine.config.optim.clip))
    totals = replace(unpack(read(), outputs[0]), taken=taken)
    recorder.mark("other")
    return totals


def update(
    engine: Engine, totals: ReducedStep, learning_rate: float, *, apply: bool = True
) -> StepResult:
    """Clip the gradients, update the parameters and the router biases, and zero the gradients.

    Without `apply`, or if loss or norm is not finite, nothing is updated, on any rank.

    Args:
        engine: model, optimizer and loss scale.
        totals: result of `compute_gradients`.
        learning_rate: of this step.
        apply: the decision of the step guard.
    """
    norm, max_norm = grad_norm(totals), engine.config.optim.clip
    finite = math.isfinite(norm) and math.isfinite(totals.loss_sum)
    apply = apply and finite
    assert apply == finite or not totals.taken, "the step has been taken"
    factor = clip_factor(norm, max_norm) if apply else 1.0
    scaler = engine.accelerator.scaler
    set_learning_rate(engine.optimizer, learning_rate)
    if apply and not totals.taken:
        if folds_clip(engine.optimizer, scaler):
            # not by way of float32: the bits of the step that the device decides alone
            sums = torch.tensor([totals.squared_grad_norm, 0, totals.loss_sum], dtype=torch.float64)
            step_as_decided(engine.optimizer, decide_step(sums, max_norm))
        else:
            clip_grads_(engine.model, norm, max_norm)
            engine.optimizer.step()
    elif scaler is not None and not apply:
        # It has unscaled the gradients of a step that is skipped, and refuses to do so again; and
        # it lowers its scale if one of them overflowed. Its own `step` would take this step where
        # only the norm did: the squares of finite gradients are infinite above 1.8e19.
        scaler.update()
    if apply:
        _update_router_biases(engine, totals)
    engine.optimizer.zero_grad()
    return StepResult(totals, norm, factor, apply)


def grad_norm(totals: ReducedStep) -> float:
    """Return the global gradient norm; NaN if the sum of squares is."""
    return math.sqrt(totals.squared_grad_norm) if totals.squared_grad_norm >= 0 else math.nan


def forward(engine: Engine, batch: Batch, prior_LE: Tensor | None) -> ModelOutput:
    """Run one forward of the wrapped model on this rank's micro-batch. Collective.

    `prior_LE`: assignments per expert in earlier micro-batches, for the global switch loss.
    """
    if engine.collective_checker is not None:
        engine.collective_checker.step = batch.step
    send, given = engine.process.send, batch.given_expert_LTK
    input, target = send(batch.input), send(batch.target)
    context = TokenContext(
        prior_count_LE=prior_LE,
        label_T=send(batch.label_B).repeat_interleave(target.shape[1]),
        noise_key=(engine.config.train.seed, batch.step),
        position_T=None if batch.position_BS is None else send(batch.position_BS.flatten()),
        valid_T=None if batch.valid_BS is None else send(batch.valid_BS.flatten()),
        first_sequence=batch.first_sequence,
        metrics_fn=batch.metrics_fn,
        given_expert_LTK=None if given is None else send(given),
    )
    output: ModelOutput = engine.wrapped_model(input, target, context)
    return output


def _global_targets(
    engine: Engine, batches: Sequence[Batch], counts: BatchCounts
) -> float | Tensor:
    """Return the number of targets of the global batch, by which the loss is divided.

    Collective where not all targets are predicted: the ranks have unequal numbers of them.
    """
    if engine.task.predicts_all_targets:
        assert counts.targets == sum(batch.target.numel() for batch in batches), "ignored targets"
        return engine.targets_per_step
    count = torch.tensor(float(counts.targets), dtype=torch.float64, device=engine.process.device)
    return all_reduce_sum(count, engine.mesh).clamp(min=1)


def _accumulate(
    engine: Engine, batches: list[Batch], recorder: NullStepRecorder, num_targets: float | Tensor
) -> list[ModelOutput]:
    """Run forward and backward of all micro-batches; gradients are reduced in the last one.

    `num_targets`: of the global batch.
    """
    outputs: list[ModelOutput] = []
    prior_LE = None
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with engine.data_parallel.grad_sync(last):
            output = forward(engine, replace(batch, metrics_fn=recorder.metrics_fn), prior_LE)
            recorder.mark("forward")
            engine.accelerator.backward(_loss(output, engine, len(batches), num_targets))
            recorder.mark("backward")
        outputs.append(detached(output))
        if engine.config.moe.balance.switch_level == "global" and not last and output.stats:
            count_LE = torch.stack([stats.choice_E for stats in output.stats])
            count_LE = all_reduce_sum(count_LE, engine.mesh)
            prior_LE = count_LE if prior_LE is None else prior_LE + count_LE
            recorder.mark("other")
    return outputs


def _loss(
    output: ModelOutput, engine: Engine, num_batches: int, num_targets: float | Tensor
) -> Tensor:
    """Return this micro-batch's share of the loss of the global batch."""
    assert output.loss_sum is not None
    loss = output.loss_sum / num_targets
    for name, coefficient in coefficients(engine.config.moe.balance).items():
        for layer in (*output.aux, *filter(None, output.module_aux)):
            loss = loss + coefficient / num_batches * layer[name]
    return loss


def _update_router_biases(engine: Engine, totals: ReducedStep) -> None:
    """Update the balance biases from the global batch's assignments before any drop.

    Equal bits on all ranks, since the counts are reduced.
    """
    balance = engine.config.moe.balance
    if not balance.bias:
        return
    found = list(balance_biases(engine.model, engine.config, totals))
    # one copy to the device for all layers
    counts = engine.process.send(torch.tensor([n for _, t in found for n in t.choice_counts]))
    start = 0
    for bias_E, _ in found:
        count_E = counts[start : (start := start + len(bias_E))]
        bias_E.copy_(updated_bias(bias_E, count_E, balance.bias, balance.recenter))
