"""The choices of a run that records: steps are collected in memory and written in whole parts.

A part is written when it is large enough, before every checkpoint, and at the end. So a run that is
killed leaves whole parts, and those before its newest checkpoint are all there; when it resumes,
later ones are cut off at the checkpoint's step and recorded again.

Letters: N tokens of a step, L MoE layers, K experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.replay.part import ChoiceSpec, Part, open_part, part_header, write_choices

FIELD = "moe.replay.record"
OWNER = "recording.json"
"""The run whose choices a directory holds."""
PART_BYTES = 32 << 20
"""A part is written when it has this many bytes of ids."""


class ChoiceWriter:
    """Writes the choices of one run, step by step. For one process: rank 0."""

    def __init__(
        self,
        folder: Path,
        spec: ChoiceSpec,
        run: str,
        step: int,
        *,
        field: str = FIELD,
        counts: bool = False,
        all_scores: bool = False,
    ) -> None:
        """Continue in `folder` after `step` steps; what it holds of later steps is removed.

        Args:
            folder: the directory; made if it is missing.
            spec: of the run.
            run: the run directory.
            step: steps done.
            field: the one that errors name.
            counts: write counts by sample in place of choices.
            all_scores: the scores to be written are those of all experts.

        Raises:
            ConfigError: it cannot be written, or holds the choices of another run.
            CheckpointError: a part before `step` is missing or damaged.
        """
        self.folder, self.spec, self.next_step = folder, spec, step
        self.field, self.counts = field, counts
        self.kind = {"rows": "sample"} if counts else {"scores": "all"} if all_scores else {}
        self._steps: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._batch = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(run)
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
            self._continue(step)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            allowed = f"cannot be written ({reason})"
            raise ConfigError(field, folder, allowed, "name another directory") from None

    def add(
        self, step: int, expert_NLK: np.ndarray, batch: str, score_NLK: np.ndarray | None = None
    ) -> None:
        """Add the choices of one step; a step that was added before replaces it and those after.

        Args:
            step: from 0.
            expert_NLK: signed ids of the global batch.
            batch: digest of the step's input tokens.
            score_NLK: of the choices, for a trace; or [N, L, E], of all experts.
        """
        if step < self.next_step:  # the run was rolled back
            self.flush()
            self._continue(step)
            self.next_step = step
        assert step == self.next_step, f"step {step} after {self.next_step} steps"
        if not self._steps:
            self._batch = batch
        count = self.spec.count if self.counts else self.spec.pack
        self._steps.append(count(expert_NLK))
        if score_NLK is not None:
            self._scores.append(score_NLK.astype(np.float32))
        self.next_step = step + 1
        if sum(array.nbytes for array in (*self._steps, *self._scores)) >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last part. Raises CheckpointError where that fails."""
        if not self._steps:
            return
        first = self.next_step - len(self._steps)
        scores = np.concatenate(self._scores) if self._scores else None
        ids = np.concatenate(self._steps)
        self._write(first, ids, self._batch, scores, self.kind)
        self._steps, self._scores = [], []

    def _write(
        self,
        first: int,
        ids_NLK: np.ndarray,
        batch: str,
        score_NLK: np.ndarray | None,
        kind: Mapping[str, str],
    ) -> None:
        steps = len(ids_NLK) // self._rows_per_step(kind)
        path = self.folder / part_name(first, first + steps)
        header = part_header(self.spec, first, steps, batch) | dict(kind)
        try:
            write_choices(path, ids_NLK, header, score_NLK)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CheckpointError(f"{path}: the choices cannot be written ({reason})") from None

    def _rows_per_step(self, kind: Mapping[str, str]) -> int:
        return self.spec.global_batch if "rows" in kind else self.spec.tokens_per_step

    def _claim(self, run: str) -> None:
        """Make the folder this run's, or refuse one that has another's choices."""
        owner = self.folder / OWNER
        if list_parts(self.folder) or owner.exists():
            before = json.loads(owner.read_text(encoding="utf-8")) if owner.exists() else {}
            if before.get("run") != run:
                allowed = f"holds the choices of {before.get('run', 'another run')}"
                raise ConfigError(self.field, self.folder, allowed, "name a new directory")
        owner.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")

    def _continue(self, step: int) -> None:
        """Remove the parts after `step` steps, and cut the one that contains it."""
        for path, first, end in list_parts(self.folder):
            if end <= step:
                continue
            if first < step:
                part = open_part(path, self.field)
                check_whole(part)
                rows = (step - first) * self._rows_per_step(part.kind)
                scores = None if part.scores is None else np.array(part.scores[:rows])
                ids, batch = np.array(part.experts[:rows]), part.header["batch"]
                self._write(first, ids, batch, scores, part.kind)
            path.unlink()
        parts = list_parts(self.folder)
        ends = {end for _, _, end in parts}
        gap = next((first for _, first, _ in parts[1:] if first not in ends), None)
        if parts and (gap is not None or parts[-1][2] != step):
            missing = parts[-1][2] if gap is None else gap - 1
            raise CheckpointError(
                f"{self.folder} lacks the choices of step {missing + 1}, which are before the "
                f"checkpoint of step {step}: name a new {self.field}"
            )


def part_name(first: int, end: int) -> str:
    """Return the name of the file with steps first .. end - 1."""
    return f"choices-{first:08d}-{end:08d}.safetensors"


def list_parts(folder: Path) -> list[tuple[Path, int, int]]:
    """List the parts of a directory with their first step and the step after their last."""
    found = []
    for path in sorted(folder.glob("choices-*-*.safetensors")):
        first, _, end = path.stem.removeprefix("choices-").partition("-")
        if first.isdecimal() and end.isdecimal():
            found.append((path, int(first), int(end)))
    return found


def check_whole(part: Part) -> None:
    """Raise CheckpointError if the ids of a part are not what was written."""
    if not part.is_whole:
        raise CheckpointError(f"{part.path} is damaged: its bytes do not have the recorded SHA-256")
