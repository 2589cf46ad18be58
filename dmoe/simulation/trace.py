"""The routing of a run, as `tracking.trace` has written it to RUN/trace.

`choices`: every token's experts, -1 where it chose fewer than K, and their scores. `scores`: the
same with the scores of all experts. `counts`: the choices of each expert by sample. All by global
sample and before any drop, so that they say what any number of ranks, any EP and any micro-batch
would have done with the same choices:

    ranks W, micro-batch n:   accumulation step a has the samples a W n .. (a + 1) W n - 1, rank by
                              rank (`dmoe.train.step.training_batches`)
    EP:                       rank r = g EP + p sends to the EP ranks of its row g, and holds the
                              p-th E / EP experts (`dmoe.distributed.mesh`)

Letters: N tokens of a step, B samples of a step, S positions per sample, L MoE layers, E experts, K
experts per token, W ranks, A accumulation steps, n samples per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import count_choices, expert_shapes, multiply_adds
from dmoe.config.rules import moe_blocks
from dmoe.config.schema import Config
from dmoe.moe.placement import ExpertPlacement, balanced_placement
from dmoe.replay.part import NONE, ChoiceSpec, Part, signed
from dmoe.replay.reader import open_parts
from dmoe.replay.writer import check_whole

FIELD = "--replay"
FOLDER = "trace"
ALL = slice(None)


@dataclass(frozen=True)
class Trace:
    """A trace whose files were checked."""

    path: Path
    parts: list[Part]
    spec: ChoiceSpec

    @cached_property
    def has_choices(self) -> bool:
        return "rows" not in self.parts[0].header

    @cached_property
    def has_scores(self) -> bool:
        return all(part.scores is not None for part in self.parts)

    @cached_property
    def has_all_scores(self) -> bool:
        return self.has_scores and all("scores" in part.kind for part in self.parts)

    @property
    def has_next_choices(self) -> bool:
        return False

    @property
    def steps(self) -> Sequence[int]:
        """The steps that it has, counted from 0."""
        return range(self.parts[0].first_step, self.parts[-1].end_step)

    def choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        """Return the experts of every token of a step, int64 [N, L, K], -1 for none.

        `samples`: those of the step to read; the same below.
        """
        assert self.has_choices, "a trace of counts has no choices"
        part, rows = self._rows(step, samples, self.spec.seq_len)
        return signed(part.experts[rows])

    def scores(self, step: int, samples: slice = ALL) -> np.ndarray:
        """Return the scores of the choices of a step, float32 [N, L, K]."""
        part, rows = self._rows(step, samples, self.spec.seq_len)
        assert part.scores is not None, "the trace has no scores"
        if "scores" not in part.kind:
            return np.asarray(part.scores[rows])
        chosen_NLK = np.maximum(self.choices(step, samples), 0)
        return np.take_along_axis(self.all_scores(step, samples), chosen_NLK, 2)

    def all_scores(self, step: int, samples: slice = ALL) -> np.ndarray:
        """Return the scores of all experts, float32 [N, L, E]; -1 of padding tokens."""
        part, rows = self._rows(step, samples, self.spec.seq_len)
        assert part.scores is not None, "the trace has no scores"
        assert "scores" in part.kind, "the trace has the scores of the choices"
        return np.asarray(part.scores[rows])

    def next_choices(self, step: int, samples: slice = ALL) -> np.ndarray:
        """Return the experts after those that a token selects, int64 [N, L, S], -1 for none."""
        raise AssertionError("only selected again (`selection.py`) a trace has next choices")

    def counts(self, step: int, samples: slice = ALL) -> np.ndarray:
        """Return the choices of each expert by sample, int64 [B, L, E]."""
        if self.has_choices:
            return self.spec.count(self.choices(step, samples)).astype(np.int64)
        part, rows = self._rows(step, samples, 1)
        return part.experts[rows].astype(np.int64)

    def _rows(self, step: int, samples: slice, rows_per_sample: int) -> tuple[Part, slice]:
        part = next(part for part in self.parts if part.first_step <= step < part.end_step)
        first, end, _ = samples.indices(self.spec.global_batch)
        start = (step - part.first_step) * self.spec.global_batch
        return part, slice((start + first) * rows_per_sample, (start + end) * rows_per_sample)


def open_trace(path: Path, config: Config | None = None, any_batch: bool = False) -> Trace:
    """Open the trace of a run, or a directory that holds one, and check every byte of it.

    Args:
        path: the run directory, or RUN/trace.
        config: one whose model the trace must be of.
        any_batch: its `train.global_batch` may be another.

    Raises:
        ConfigError: there is none, or it is of another model.
        CheckpointError: it is damaged, or lacks a step.
    """
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not folder.is_dir():
        allowed = "is no directory with a trace"
        raise ConfigError(FIELD, path, allowed, "give a run that had tracking.trace=choices")
    parts = open_parts(folder, FIELD)
    before: Part | None = None
    for part in parts:
        _check_part(part, before)
        before = part
    trace = Trace(folder, parts, parts[0].spec)
    if config is not None:
        check_model(trace, config, any_batch)
    return trace


def _check_part(part: Part, before: Part | None) -> None:
    """Refuse a part that does not go on where the one before it ends, or has not its size."""
    if "spec" not in part.header:
        raise ConfigError(FIELD, part.path, "was not written by a run", "name a run's trace")
    check_whole(part)
    spec, steps = part.spec, part.end_step - part.first_step
    counted = part.header.get("rows") == "sample"
    rows = steps * (spec.global_batch if counted else spec.tokens_per_step)
    shape = (rows, spec.layers, spec.experts if counted else spec.top_k)
    if part.experts.shape != shape:
        allowed = f"holds {list(part.experts.shape)}, not {list(shape)} of its header"
        raise ConfigError(FIELD, part.path, allowed, "record it again")
    if part.scores is not None:
        last = spec.experts if "scores" in part.kind else spec.top_k
        if part.scores.shape != (rows, spec.layers, last):
            allowed = f"holds scores of {list(part.scores.shape)}, not of its {last} experts"
            raise ConfigError(FIELD, part.path, allowed, "record it again")
    if before is not None and (part.first_step != before.end_step or spec != before.spec):
        allowed = f"does not go on at step {before.end_step + 1} of the same run"
        raise ConfigError(FIELD, part.path, allowed, "record it again")
    if not counted and part.experts.size:
        ids = signed(part.experts)
        if ids.min() < NONE or ids.max() >= spec.experts:
            allowed = f"names expert {int(ids.max())}, and there are {spec.experts}"
            raise ConfigError(FIELD, part.path, allowed, "record it again")


def check_model(trace: Trace, config: Config, any_batch: bool = False) -> None:
    """Refuse a trace of another model or batch than the config's; with `any_batch`, of a model.

    Raises:
        ConfigError: names the first number that differs.
    """
    spec, moe = trace.spec, config.moe
    numbers = {
        "MoE layers (model.layers)": (spec.layers, len(moe_blocks(config))),
        "experts (moe.num_experts)": (spec.experts, count_choices(moe)),
        "experts per token (moe.top_k)": (spec.top_k, moe.top_k),
        "positions per sequence (data.seq_len)": (spec.seq_len, config.data.seq_len),
        "sequences per step (train.global_batch)": (spec.global_batch, config.train.global_batch),
    }
    if any_batch:
        numbers.popitem()
    for words, (found, wanted) in numbers.items():
        if found != wanted and config.model.source is None:
            allowed = f"has {found} {words}, and the config {wanted}"
            raise ConfigError(FIELD, trace.path, allowed, "use the config of its run")


def slots_of(placement: ExpertPlacement, unused: int) -> list[int]:
    """List the experts of all ranks, equally many of each: `unused` where a rank has fewer."""
    size = placement.experts_per_rank
    return [e for own in placement.experts for e in (*own, *[unused] * (size - len(own)))]


def first_placement(config: Config, ep: int) -> ExpertPlacement | None:
    """Return where experts of different shapes are, as training places them; None: equal runs."""
    moe, dim = config.moe, config.model.dim
    if not moe.experts.shapes or ep > moe.num_experts:
        return None
    costs = [multiply_adds(shape, dim, dim, moe.experts.kind) for shape in expert_shapes(moe)]
    return balanced_placement(costs, [tuple(shape) for shape in moe.experts.shapes], ep)


def by_rank(count_BLE: np.ndarray, ranks: int, ep: int, micro_batch: int) -> np.ndarray:
    """Sum counts over the samples of each rank and the experts of each EP rank.

    Args:
        count_BLE: of a step, without zero-cost experts.
        ranks: W.
        ep: EP; divides W and E.
        micro_batch: n; W n divides B.

    Returns:
        int64 [A, L, W, EP]: rows that rank w sends to each EP rank of its row.
    """
    samples, layers, experts = count_BLE.shape
    accumulation = samples // (ranks * micro_batch)
    shape = (accumulation, ranks, micro_batch, layers, ep, experts // ep)
    sent_AWLP: np.ndarray = count_BLE.reshape(shape).sum((2, 5), dtype=np.int64)
    return sent_AWLP.transpose(0, 2, 1, 3)


def rows_of_ranks(sent_ALWP: np.ndarray) -> np.ndarray:
    """Return the rows that each rank's experts receive, int64 [A, L, W], from `by_rank`."""
    accumulation, layers, ranks, ep = sent_ALWP.shape
    rows: np.ndarray = sent_ALWP.reshape(accumulation, layers, ranks // ep, ep, ep).sum(3)
    return rows.reshape(accumulation, layers, ranks)


def load_per_rank(trace: Trace, ranks: int, ep: int, micro_batch: int) -> np.ndarray:
    """Return the rows that each rank's experts receive before drops, int64 [steps, A, L, W].

    Args:
        trace: of choices or counts; zero-cost experts are not among its experts.
        ranks: W.
        ep: EP; divides W and E.
        micro_batch: n, sequences per rank and accumulation step; W n divides B.

    Raises:
        ConfigError: ranks, EP or micro-batch do not divide what they must.
    """
    check_layout(trace.spec, ranks, ep, micro_batch)
    return np.stack(
        [rows_of_ranks(by_rank(trace.counts(step), ranks, ep, micro_batch)) for step in trace.steps]
    )


def check_layout(
    spec: ChoiceSpec, ranks: int, ep: int, micro_batch: int, experts: int | None = None
) -> None:
    """Refuse a layout that does not divide the batch, the ranks or the experts.

    `experts`: those that ranks hold, without zero-cost ones. Raises ConfigError.
    """
    if spec.global_batch % (ranks * micro_batch):
        allowed = (
            f"times a micro-batch of {micro_batch} does not divide the {spec.global_batch} "
            "sequences of a step"
        )
        fits = [n for n in range(1, spec.global_batch + 1) if spec.global_batch % n == 0]
        raise ConfigError("--ranks", ranks, allowed, f"use one of {fits} with micro_batch=1")
    experts = spec.experts if experts is None else experts
    if ep < 1 or ranks % ep or experts % ep:
        allowed = f"must divide the {ranks} ranks and the {experts} experts"
        fits = [n for n in range(1, ranks + 1) if ranks % n == 0 and experts % n == 0]
        raise ConfigError("--ep", ep, allowed, f"use one of {fits}")
