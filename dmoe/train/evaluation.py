"""Loss on held-out samples: deterministic, the same on any number of ranks.

Letters: M domains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.distributed.gradients import all_reduce_sum
from dmoe.models.base import IGNORE, ModelOutput
from dmoe.moe.metrics import MetricsFn, ObservedContext, decisions, nothing_more
from dmoe.train.engine import Engine
from dmoe.train.routing_analysis import ComputeVsLoss, RoutingProbe, RoutingSnapshot
from dmoe.train.tasks import Data, Score

SUMS = 4  # the fields of a Score


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats a target."""
    tokens: int
    """Targets it is the mean of."""
    measures: dict[str, float]
    """What people read: bits_per_byte (comparable between tokenizers), accuracy; see the task."""
    missing: dict[str, float] = field(default_factory=dict)
    """The accuracy without each stream that may be missing."""
    by_domain: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same for each domain that was reached, if there is more than one."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """What the probe saw of each MoE layer; empty without one."""

    def line(self) -> dict[str, Any]:
        """Of metrics.jsonl."""
        found = {"loss": self.loss, **self.measures, "split": "held_out", "tokens": self.tokens}
        parts = {"missing": self.missing, "by_domain": self.by_domain, "layers": self.layers}
        return found | {name: part for name, part in parts.items() if part}


@torch.no_grad()  # not inference_mode: FSDP2 keeps the tensors it gathers into, and training could not write into them
def evaluate(
    engine: Engine,
    data: Data,
    stop: Callable[[], bool] = lambda: False,
    probe: RoutingProbe | None = None,
) -> Evaluation | None:
    """Mean loss over the first `train.eval_sequences` held-out samples; None if some rank was told to `stop` on the way.

    One small reduction (4 M + 1 numbers) and one host read a batch, so that a signal does not have to wait for the last one. `probe`
    looks at the layers' decisions on the way, for one reduction more. Where streams may be missing, once more without each of them.
    """
    difficulty, looks, sums = ComputeVsLoss(engine), list[RoutingSnapshot](), list[Tensor]()

    def look(output: ModelOutput, label_T: Tensor, valid_T: Tensor) -> None:
        if probe is not None:
            assert output.loss_T is not None
            looks[:] = probe.update(output.stats, label_T, looks)
            sums[:] = difficulty.update(output.stats, output.loss_T, valid_T, sums)

    engine.wrapped.eval()
    scores = _scores(engine, data, stop, look, nothing_more if probe is None else decisions)
    missing: dict[str, float] = {}
    for stream in engine.task.streams:
        less = None if scores is None else _scores(engine, data, stop, without=stream)
        if less is None:
            scores = None
            break
        missing[stream] = engine.task.measures(_sum(less))["accuracy"]
    engine.wrapped.train()
    if scores is None:
        return None
    layers = (
        []
        if probe is None
        else [a | b for a, b in zip(probe.report(looks), difficulty.report(sums), strict=True)]
    )
    return _result(engine, scores, data.domains, missing, layers)


def _scores(
    engine: Engine,
    data: Data,
    stop: Callable[[], bool],
    look: Callable[[ModelOutput, Tensor, Tensor], None] = lambda output, label_T, valid_T: None,
    observer: MetricsFn = nothing_more,
    without: str | None = None,
) -> list[Score] | None:
    """Of each domain, over all ranks; None if some rank was told to stop."""
    device = engine.process.device
    totals = torch.zeros(max(1, len(data.domains)) * SUMS + 1, dtype=torch.float64, device=device)
    for part in evaluation_batches(data.held_out, engine):
        if without is not None:
            part = replace(part, input=engine.task.mask_stream(part.input, without))
        label_T = part.label_B.to(device).repeat_interleave(part.target.shape[1])
        valid_T = part.valid_BS.flatten().to(device)
        context = ObservedContext(valid_T=valid_T, label_T=label_T, observer=observer)
        output: ModelOutput = engine.wrapped(part.input.to(device), part.target.to(device), context)
        told = torch.tensor([float(stop())], dtype=torch.float64, device=device)
        totals += all_reduce_sum(
            torch.cat([_sums(engine, data, part, label_T, output).flatten(), told]), engine.mesh
        )
        if totals[-1].item() > 0:
            return None
        look(output, label_T, valid_T)
    return [Score(*row) for row in totals[:-1].view(-1, SUMS).tolist()]


def _sums(
    engine: Engine, data: Data, part: EvalBatch, label_T: Tensor, output: ModelOutput
) -> Tensor:
    """float64 [M, 4]: what a Score holds, of this rank's part of one batch."""
    nats_T, hit_T = output.loss_T, output.correct_T
    assert nats_T is not None, "a model in evaluation tells of each target"
    assert hit_T is not None
    target = part.target.to(label_T.device)
    valid_T = part.valid_BS.to(label_T.device).flatten()
    read_T = engine.task.bytes_per_target(data, target).flatten()
    ones_T = torch.ones_like(nats_T, dtype=torch.float64)
    each_T4 = torch.stack([nats_T.double(), ones_T, read_T.double(), hit_T.double()], 1)
    none_M4 = each_T4.new_zeros(max(1, len(data.domains)), SUMS)
    return none_M4.index_add(0, label_T, each_T4 * valid_T.unsqueeze(1))


def _sum(scores: list[Score]) -> Score:
    return Score(
        *(
            sum(getattr(score, name) for score in scores)
            for name in ("loss_sum", "targets", "read_bytes", "correct")
        )
    )


def _result(
    engine: Engine,
    scores: list[Score],
    domains: tuple[str, ...],
    missing: dict[str, float],
    layers: list[dict[str, Any]],
) -> Evaluation:
    total = _sum(scores)
    by_domain = {
        name: {"loss": score.loss, **engine.task.measures(score), "tokens": score.targets}
        for name, score in zip(domains, scores, strict=False)
        if score.targets
    }
    measures = dict(engine.task.measures(total))
    return Evaluation(
        total.loss,
        int(total.targets),
        measures,
        missing,
        by_domain if len(domains) > 1 else {},
        layers,
    )


@dataclass(frozen=True)
class EvalBatch:
    """One batch of an evaluation, on this rank."""

    input: Tensor
    target: Tensor
    """int64 [B, S]; -100 for padding."""
    valid_BS: Tensor
    label_B: Tensor


def evaluation_batches(stream: Any, engine: Engine) -> Iterator[EvalBatch]:
    """The first `eval_sequences` held-out samples, shared by the ranks.

    Every rank yields equally many batches of equal shape (the experts' exchange needs all of them); what is missing at the end is
    padding: target -100, valid False.
    """
    world, count = engine.process, engine.sequences
    wanted = engine.config.train.eval_sequences
    total = wanted if stream.sequences is None else min(wanted, stream.sequences)
    for start in range(0, total, world.world_size * count):
        first = start + world.rank * count
        there = max(0, min(count, total - first))
        input, target, label_B = engine.task.dummy_batch(count)
        if there:
            found = engine.task.samples(stream, first, there)
            for whole, part in zip((input, target, label_B), found, strict=True):
                whole[:there] = part
        valid_BS = (torch.arange(count) < there).unsqueeze(1).expand_as(target)
        yield EvalBatch(input, target.masked_fill(~valid_BS, IGNORE), valid_BS, label_B)
