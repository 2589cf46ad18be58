"""Choices of experts of a run: recorded (`moe.replay.record`, `tracking.trace`), or given
(`moe.replay.from`).

Recording costs one all-gather of a step's ids (and for a trace one of its scores) over all ranks
per step, one read of each by the host, and the memory of a part on rank 0. Replaying reads the ids
of this rank's samples from mapped files.

Letters: A accumulation steps, W ranks, n sequences per forward, S positions, L MoE layers, K
experts per token, T = n S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.config.router_kinds import router_spec
from dmoe.distributed.init import run_on_rank0
from dmoe.distributed.mesh import ProcessGroupComm
from dmoe.models.base import ModelOutput
from dmoe.moe.routers.replayed import (
    choices,
    choices_with_all_scores,
    choices_with_scores,
    count_own,
    sampled_scores,
)
from dmoe.moe.routing import DispatchPlan, MetricsFn, Routing, TokenContext
from dmoe.observability.logger import RunLogger
from dmoe.replay import ChoiceReader, ChoiceSpec, ChoiceWriter
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.engine import Engine
from dmoe.train.reduction import NullStepRecorder
from dmoe.train.step import Batch
from dmoe.train.tasks import DataSplits

TRACE = "trace"
"""Folder of the trace in the run directory."""
SCORES = {
    "choices": ("score_TK", choices_with_scores),
    "scores": ("score_TE", choices_with_all_scores),
}
"""The scores that a trace has, and what computes them."""


def check_replay(engine: Engine, data: DataSplits) -> None:
    """Refuse choices that are not there, too few, or of another shape. Collective if any are given.

    Before a run directory is made; `Replay` checks what they hold, once the next step is known.
    Cost: 1 broadcast of 4 KiB, no read of ids.

    Raises on all ranks:
        ConfigError: the choices belong to another model or other data, or end too early.
        CheckpointError: a file cannot be read.
    """
    config = engine.config
    if config.moe.replay.from_ is None:
        return
    path = Path(config.moe.replay.from_).expanduser()

    def check() -> str:
        ChoiceReader(path, choice_spec(engine, data)).check_end(config.train.steps)
        return ""

    run_on_rank0(engine.process, check)


def choice_spec(engine: Engine, data: DataSplits) -> ChoiceSpec:
    """Return what the choices of a run belong to."""
    config, layers = engine.config, engine.model.moe_layers()
    return ChoiceSpec(
        data=data.fingerprint,
        seed=config.train.seed,
        global_batch=config.train.global_batch,
        seq_len=engine.task.targets_per_sample,
        layers=len(layers),
        experts=layers[0].num_experts,
        top_k=config.moe.top_k,
    )


class Replay:
    """The recording and the given choices of one run; without `moe.replay` it does nothing."""

    def __init__(
        self, engine: Engine, data: DataSplits, run: Path, checkpointer: Checkpointer
    ) -> None:
        """Open both. Collective.

        Args:
            engine: config, ranks and MoE layers.
            data: of the run.
            run: the run directory.
            checkpointer: has restored the run; it is told to write choices before a checkpoint.

        Raises on all ranks:
            ConfigError: the choices belong to another model or other data, or to another run.
            CheckpointError: a file is missing or damaged.
        """
        self.engine, self.data, self.notes = engine, data, checkpointer.notes
        step, checkpointer.before_save = max(0, checkpointer.last_saved_step), self.flush
        config = engine.config.moe.replay
        self.reader: ChoiceReader | None = None
        self.writers: list[ChoiceWriter] = []
        self.trace = engine.config.tracking.trace
        self.records = config.record is not None or self.trace != "none"
        if config.from_ is not None:
            self.reader = self._open_reader(Path(config.from_).expanduser(), step)
        self.unknown_tokens = self.reader is not None and not self.reader.recorded
        """Whether the next step compares the given experts with the router's own."""
        if config.record is not None:
            folder = Path(config.record).expanduser()
            self._on_rank0(lambda: self._open_writer(folder, run, step))
        if self.trace != "none":
            kinds = {"counts": self.trace == "counts", "all_scores": self.trace == "scores"}
            options = {"field": "tracking.trace", **kinds}
            self._on_rank0(lambda: self._open_writer(run / TRACE, run, step, **options))

    def given(self, batches: list[Batch], step: int) -> list[Batch]:
        """Return this rank's batches of a step with their given choices, if there are any."""
        if self.reader is None:
            return batches
        return [
            replace(batch, given_expert_LTK=self._given(self.reader, batch, step))
            for batch in batches
        ]

    def recorder(self, recorder: NullStepRecorder) -> NullStepRecorder:
        """Return a recorder of a step that collects the choices too, if they are recorded."""
        if self.records:
            recorder = ChoiceRecorder(recorder, self.trace)
        return OwnChoiceRecorder(recorder, self.engine) if self.unknown_tokens else recorder

    def record(self, step: int, recorder: NullStepRecorder, logger: RunLogger) -> None:
        """Record the choices of a step, from its recorder. Collective if they are recorded."""
        if isinstance(recorder, OwnChoiceRecorder):  # the first step, choices of another program
            self.unknown_tokens = False
            if warning := self._compare(recorder.own_L2):
                logger.alert(step + 1, "replay", warning)
            recorder = recorder.inner
        if not isinstance(recorder, ChoiceRecorder):
            return
        expert_NLK = self._gather(recorder.choice_ATLK)
        score_NLK = None
        if recorder.score_ATLK is not None:
            score_NLK = self._gather(recorder.score_ATLK).numpy()

        def add() -> None:
            digest = self.batch_digest(step)
            for writer in self.writers:
                scores = score_NLK if writer.field == "tracking.trace" else None
                writer.add(step, expert_NLK.numpy(), digest, scores)

        self._on_rank0(add)

    def _compare(self, own_L2: Tensor) -> str:
        """Describe the layer whose router agrees least with the given experts, if near chance.

        Args:
            own_L2: the counts of `count_own` on this rank, by MoE layer.
        """
        if self.engine.mesh.world_size > 1:
            own_L2 = ProcessGroupComm(self.engine.mesh).gather(own_L2).sum(0)
        share_L = own_L2[:, 0] / own_L2[:, 1].clamp(min=1)
        layer = int(share_L.argmin())
        spec, share = choice_spec(self.engine, self.data), float(share_L[layer])
        chance = spec.top_k / spec.experts
        if share >= min(2 * chance, 0.5):
            return ""
        return (
            f"of the experts that moe.replay.from gives in MoE layer {layer}, its router would "
            f"have chosen {share:.0%} itself, and {chance:.0%} is chance: check the order of the "
            "tokens and layers in the file, and that it is of this model"
        )

    def flush(self) -> None:
        """Write what was recorded; before every checkpoint, so that none is ahead of its choices.

        Collective if choices are recorded. Raises CheckpointError on all ranks.
        """
        if self.records:
            self._on_rank0(self._flush)

    def batch_digest(self, step: int) -> str:
        """Return the SHA-256 of the input tokens of the global batch of a step."""
        size = self.engine.config.train.global_batch
        samples = self.engine.task.training_samples(self.data.train, step, 0, size, size)
        tokens = samples.input.to(torch.int64).contiguous().numpy()
        return hashlib.sha256(tokens.astype("<i8").data).hexdigest()

    def _open_reader(self, path: Path, step: int) -> ChoiceReader:
        """Check all files on rank 0, then map them on each."""
        config = self.engine.config
        spec = choice_spec(self.engine, self.data)
        partly = router_spec(config.moe.router.kind).variable_k
        end = config.train.steps
        self._on_rank0(
            lambda: ChoiceReader(path, spec).check(step, end, self.batch_digest, partly=partly)
        )
        reader = ChoiceReader(path, spec)
        if not reader.recorded:
            self.notes.append(
                f"moe.replay.from={path} does not say which tokens it belongs to: only its shape "
                "and its ids were checked"
            )
        return reader

    def _flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def _open_writer(self, folder: Path, run: Path, step: int, **options: Any) -> None:
        spec = choice_spec(self.engine, self.data)
        self.writers.append(ChoiceWriter(folder, spec, str(run), step, **options))

    def _given(self, reader: ChoiceReader, batch: Batch, step: int) -> Tensor:
        """Return the choices of a batch, int64 [L, T, K]."""
        expert_TLK = reader.read(step, batch.first_sequence, len(batch.input))
        return torch.from_numpy(expert_TLK).transpose(0, 1).contiguous()

    def _gather(self, choice_ATLK: Tensor) -> Tensor:
        """Return the choices (or scores) of the global batch in the order of its samples, CPU."""
        if self.engine.mesh.world_size > 1:
            choice_WATLK = ProcessGroupComm(self.engine.mesh).gather(choice_ATLK)
            choice_ATLK = choice_WATLK.transpose(0, 1).flatten(0, 1)
        return choice_ATLK.flatten(0, 1).cpu()

    def _on_rank0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0, and raise its error on all ranks. Collective."""

        def run() -> str:
            action()
            return ""

        run_on_rank0(self.engine.process, run)


class ChoiceRecorder(NullStepRecorder):
    """Collects the choices of a step beside what another recorder collects."""

    def __init__(self, inner: NullStepRecorder, trace: str = "none") -> None:
        self.inner, self.choice_ATLK = inner, torch.empty(0)
        self.score_ATLK: Tensor | None = None
        self.scores, self.own_fn = SCORES.get(trace, ("", choices))
        self.metrics_fn: MetricsFn | None = self._metrics

    def mark(self, phase: str) -> None:
        self.inner.mark(phase)

    def collect(self, outputs: Sequence[ModelOutput]) -> None:
        def stacked(name: str) -> Tensor:
            steps = [[stats.metrics[name] for stats in output.stats] for output in outputs]
            return torch.stack([torch.stack(layers, 1) for layers in steps])

        self.choice_ATLK = stacked("choice_TK")
        if self.scores:
            self.score_ATLK = stacked(self.scores)
        self.inner.collect(outputs)

    def _metrics(
        self, routing: Routing, plan: DispatchPlan, context: TokenContext
    ) -> dict[str, Tensor]:
        inner = self.inner.metrics_fn
        more = {} if inner is None else inner(routing, plan, context)
        return more | self.own_fn(routing, plan, context)


class OwnChoiceRecorder(NullStepRecorder):
    """Counts the given experts that the routers would have chosen, beside another recorder."""

    def __init__(self, inner: NullStepRecorder, engine: Engine) -> None:
        self.inner, self.engine, self.own_L2 = inner, engine, torch.empty(0)
        self.metrics_fn: MetricsFn | None = self._metrics

    def mark(self, phase: str) -> None:
        self.inner.mark(phase)

    def collect(self, outputs: Sequence[ModelOutput]) -> None:
        counts = []
        for index, layer in enumerate(self.engine.model.moe_layers()):
            found = [output.stats[index].metrics for output in outputs]
            choice_NK = torch.cat([metrics["sampled_choice_TK"] for metrics in found])
            score_NE = torch.cat([metrics["sampled_score_TE"] for metrics in found])
            counts.append(count_own(choice_NK, score_NE, layer.balance_bias))
        self.own_L2 = torch.stack(counts)
        self.inner.collect(outputs)

    def _metrics(
        self, routing: Routing, plan: DispatchPlan, context: TokenContext
    ) -> dict[str, Tensor]:
        inner = self.inner.metrics_fn
        more = {} if inner is None else inner(routing, plan, context)
        return more | sampled_scores(routing, plan, context)
