"""Evaluation on held-out samples: deterministic, with equal results on any number of ranks.

Letters: B sequences of this process, S positions, T = B S tokens, M domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import all_reduce_sum
from dmoe.models.base import IGNORE_INDEX, ModelOutput
from dmoe.moe.metrics import decisions
from dmoe.moe.routing import MetricsFn, TokenContext, masked
from dmoe.observability.display.state import format_measure
from dmoe.train.engine import Engine
from dmoe.train.routing_analysis import ComputeVsLoss, RoutingProbe, RoutingSnapshot
from dmoe.train.signals import StopRequested
from dmoe.train.tasks import DataSplits, Score

NUM_SUMS = 4  # fields of a Score
UpdateFn = Callable[[ModelOutput, Tensor, Tensor], None]
"""Called with the output of each batch, its label_T, and which of its targets are predicted."""


@dataclass(frozen=True)
class EvalBatch:
    """One evaluation batch of this rank."""

    input: Tensor
    target: Tensor
    """int64 [B, S]; -100 for padding and what else is not predicted."""
    valid_BS: Tensor
    label_B: Tensor
    """int64: domain of each sample."""
    position_BS: Tensor | None = None
    """int64: position of each token in its document; None: each sample is one document."""
    first_sequence: int = 0
    """Index of the first sample among those that are evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation over all ranks."""

    loss: float
    """Mean cross-entropy in nats per target."""
    targets: int
    metrics: dict[str, float]
    """The task's metrics: bits_per_byte (comparable between tokenizers) or accuracy."""
    missing_stream_accuracy: dict[str, float] = field(default_factory=dict)
    """Accuracy without each of the streams that may be missing."""
    by_domain: dict[str, dict[str, float]] = field(default_factory=dict)
    """Loss, metrics and targets of each domain that has any, if there is more than one domain."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """Routing analysis of each MoE layer; empty without a probe."""

    def record(self) -> dict[str, Any]:
        """Return the values of an `eval` line in metrics.jsonl."""
        values = {"loss": self.loss, **self.metrics, "split": "held_out", "tokens": self.targets}
        parts = {
            "missing": self.missing_stream_accuracy,
            "by_domain": self.by_domain,
            "layers": self.layers,
        }
        return values | {name: part for name, part in parts.items() if part}

    def summary(self, unit: str) -> str:
        """Return loss and metrics as text; `unit` is the word for a target."""
        metrics = "".join(f", {format_measure(*item)}" for item in self.metrics.items())
        return f"validation loss {self.loss:.3f}{metrics} over {self.targets:,} {unit}s"


# Not inference_mode: FSDP2 keeps the tensors that it gathers into, and training could not write
# into them afterwards.
@torch.no_grad()
def evaluate(
    engine: Engine,
    data: DataSplits,
    stop: Callable[[], bool] = lambda: False,
    probe: RoutingProbe | None = None,
    update: UpdateFn | None = None,
) -> Evaluation:
    """Evaluate the first `train.eval_sequences` held-out samples. Collective.

    Per batch one reduction of 4 M + 1 numbers and one host read, so that a signal is acted on after
    one batch. A probe costs one further reduction. If streams may be missing, the samples are
    evaluated once more without each of them.

    Args:
        engine: the model; it is in training mode again afterwards.
        data: its held-out split is read.
        stop: whether this rank wants to stop; asked per batch.
        probe: analyses the routing decisions.
        update: called for each batch, with all streams.

    Raises:
        StopRequested: on all ranks, if `stop()` is true on any of them.
    """
    compute_vs_loss = ComputeVsLoss(engine)
    snapshots, sums = list[RoutingSnapshot](), list[Tensor]()

    def update_all(output: ModelOutput, label_T: Tensor, predicted_T: Tensor) -> None:
        if update is not None:
            update(output, label_T, predicted_T)
        if probe is not None:
            assert output.loss_T is not None
            snapshots[:] = probe.update(output.stats, label_T, snapshots)
            sums[:] = compute_vs_loss.update(output.stats, output.loss_T, predicted_T, sums)

    accuracy: dict[str, float] = {}
    engine.wrapped_model.eval()
    try:
        metrics_fn = None if probe is None else decisions
        scores = _domain_scores(engine, data, stop, update_all, metrics_fn)
        for stream in engine.task.streams:
            masked = _domain_scores(engine, data, stop, masked_stream=stream)
            accuracy[stream] = engine.task.metrics(_total_score(masked))["accuracy"]
    finally:
        engine.wrapped_model.train()
    layers: list[dict[str, Any]] = []
    if probe is not None:
        reports = zip(probe.report(snapshots), compute_vs_loss.report(sums), strict=True)
        layers = [routing | compute for routing, compute in reports]
    total = _total_score(scores)
    by_domain = {
        name: {"loss": score.loss, **engine.task.metrics(score), "tokens": score.targets}
        for name, score in zip(data.domains, scores, strict=False)
        if score.targets
    }
    return Evaluation(
        total.loss,
        int(total.targets),
        dict(engine.task.metrics(total)),
        accuracy,
        by_domain if len(data.domains) > 1 else {},
        layers,
    )


def evaluation_batches(dataset: Any, engine: Engine) -> Iterator[EvalBatch]:
    """Yield this rank's part of the first `train.eval_sequences` samples.

    All ranks yield equally many batches of equal shape, since the all-to-all of experts needs all
    of them. The end is filled with padding: target -100, valid False.
    """
    process, count = engine.process, engine.sequences_per_forward
    total = engine.config.train.eval_sequences
    if dataset.num_sequences is not None:
        total = min(total, dataset.num_sequences)
    for start in range(0, total, process.world_size * count):
        first = start + process.rank * count
        num_valid = max(0, min(count, total - first))
        empty = engine.task.dummy_batch(count)
        samples = engine.task.samples(dataset, first, num_valid) if num_valid else empty.no_rows()
        batch = samples.pad(empty)
        assert batch.valid_BS is not None
        yield EvalBatch(
            batch.input, batch.target, batch.valid_BS, batch.label_B, batch.position_BS, first
        )


def _no_update(output: ModelOutput, label_T: Tensor, predicted_T: Tensor) -> None:
    pass


def _domain_scores(
    engine: Engine,
    data: DataSplits,
    stop: Callable[[], bool],
    update: UpdateFn = _no_update,
    metrics_fn: MetricsFn | None = None,
    masked_stream: str | None = None,
) -> list[Score]:
    """Return the score of each domain over all ranks. Raises StopRequested."""
    device, num_domains = engine.process.device, max(1, len(data.domains))
    totals = torch.zeros(num_domains * NUM_SUMS + 1, dtype=torch.float64, device=device)
    for batch in evaluation_batches(data.held_out, engine):
        if masked_stream is not None:
            batch = replace(batch, input=engine.task.mask_stream(batch.input, masked_stream))
        label_T = batch.label_B.to(device).repeat_interleave(batch.target.shape[1])
        position_BS = batch.position_BS
        context = TokenContext(
            valid_T=batch.valid_BS.flatten().to(device),
            label_T=label_T,
            position_T=None if position_BS is None else position_BS.flatten().to(device),
            first_sequence=batch.first_sequence,
            metrics_fn=metrics_fn,
        )
        output: ModelOutput = engine.wrapped_model(
            batch.input.to(device), batch.target.to(device), context
        )
        sums_M4 = _batch_sums(engine, data, batch, label_T, output)
        stop_1 = torch.tensor([float(stop())], dtype=torch.float64, device=device)
        totals += all_reduce_sum(torch.cat([sums_M4.flatten(), stop_1]), engine.mesh)
        if totals[-1].item() > 0:
            raise StopRequested
        update(output, label_T, batch.target.to(device).flatten() != IGNORE_INDEX)
    return [Score(*sums) for sums in totals[:-1].view(-1, NUM_SUMS).tolist()]


def _batch_sums(
    engine: Engine, data: DataSplits, batch: EvalBatch, label_T: Tensor, output: ModelOutput
) -> Tensor:
    """Return the fields of each domain's Score, from this rank's batch: float64 [M, 4]."""
    loss_T, correct_T = output.loss_T, output.correct_T
    assert loss_T is not None, "a model in evaluation mode gives the loss of each target"
    assert correct_T is not None
    target = batch.target.to(label_T.device)
    predicted_T = target.flatten() != IGNORE_INDEX
    bytes_T = engine.task.bytes_per_target(data, target).flatten()
    ones_T = torch.ones_like(loss_T, dtype=torch.float64)
    sums_T4 = torch.stack([loss_T.double(), ones_T, bytes_T.double(), correct_T.double()], 1)
    zeros_M4 = sums_T4.new_zeros(max(1, len(data.domains)), NUM_SUMS)
    return zeros_M4.index_add(0, label_T, masked(sums_T4, predicted_T))


def _total_score(scores: list[Score]) -> Score:
    return Score(
        *(
            sum(getattr(score, name) for score in scores)
            for name in ("loss_sum", "targets", "target_bytes", "correct")
        )
    )
