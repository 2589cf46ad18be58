"""The choices that a run is to train with, checked before its first step.

Letters: N tokens, L MoE layers, K experts per token, B samples of a step, S positions per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.replay.part import NONE, ChoiceSpec, Part, open_part, signed
from dmoe.replay.writer import check_whole, list_parts

FIELD = "moe.replay.from"
CHUNK = 1 << 16
"""Tokens that are checked at a time."""
FIELDS = {
    "layers": "MoE layers",
    "experts": "experts",
    "top_k": "experts per token (moe.top_k)",
    "seq_len": "positions per sequence (data.seq_len)",
    "global_batch": "sequences per step (train.global_batch)",
    "seed": "train.seed",
    "data": "data of fingerprint",
}
"""How messages name the fields of `ChoiceSpec`, in the order of the checks."""


class ChoiceReader:
    """Choices by step and sample.

    A directory that a run has recorded, or one file of another program: the tokens of steps 0, 1,
    ... in the order in which the run reads them.
    """

    def __init__(self, path: Path, spec: ChoiceSpec) -> None:
        """Open the choices; `spec` is that of the run which reads them.

        Raises:
            ConfigError: they are not there, or belong to another model or other data.
        """
        self.path, self.spec = path, spec
        self.parts = open_parts(path)
        self.recorded = bool(self.parts[0].header.get("spec"))
        """Whether dmoe has written them, so that the data can be compared."""
        for part in self.parts:
            self._check_shape(part)

    def check(
        self, first: int, end: int, batch: Callable[[int], str], *, partly: bool = False
    ) -> None:
        """Read all choices of steps first .. end - 1 and refuse those that no run could make.

        Args:
            first: the next step of the run.
            end: the step after its last.
            batch: returns the digest of the input tokens of a step.
            partly: tokens may have fewer than K experts.

        Raises:
            ConfigError: a step is missing, its tokens are others, or ids are not those of experts.
            CheckpointError: a file is damaged.
        """
        step = first
        for part in self.parts:
            start, stop = self._steps(part)
            if stop <= first or start >= end:
                continue
            if start > step:
                break
            if "sha256" in part.header:
                check_whole(part)
            if self.recorded and batch(start) != part.header["batch"]:
                self._refuse(
                    f"was recorded with other sequences in step {start + 1}",
                    "use the data of that run, in its order",
                )
            self._check_ids(part, partly)
            step = stop
        if step < end:
            self._refuse_end(step, end, first)

    def check_end(self, end: int) -> None:
        """Refuse choices that end before step `end`, without a read of them. Raises ConfigError."""
        last = max(self._steps(part)[1] for part in self.parts)
        if last < end:
            self._refuse_end(last, end, 0)

    def read(self, step: int, first: int, count: int) -> np.ndarray:
        """Return the choices of samples first .. first + count - 1 of a step.

        Returns:
            int64 [count * S, L, K], -1 for a choice that is not made.
        """
        for part in self.parts:
            start, stop = self._steps(part)
            if start <= step < stop:
                row = ((step - start) * self.spec.global_batch + first) * self.spec.seq_len
                return signed(part.experts[row : row + count * self.spec.seq_len])
        raise AssertionError(f"step {step + 1} was checked and is not there")

    def _steps(self, part: Part) -> tuple[int, int]:
        if self.recorded:
            return part.first_step, part.end_step
        return 0, len(part.experts) // self.spec.tokens_per_step

    def _check_shape(self, part: Part) -> None:
        tokens, layers, top_k = part.experts.shape
        found = {"layers": layers, "top_k": top_k}
        if self.recorded:
            if "spec" not in part.header:
                self._refuse(f"holds {part.path.name}, which no run has recorded", "remove it")
            found = asdict(part.spec) | found
        for name, words in FIELDS.items():
            wanted = getattr(self.spec, name)
            if found.get(name, wanted) != wanted:
                cut = 12 if name == "data" else None
                values = [str(value)[:cut] for value in (found[name], wanted)]
                self._refuse(
                    f"has {values[0]} {words}, and this run {values[1]}"
                    if not words.startswith(("train", "data"))
                    else f"was recorded with {words} {values[0]}, and this run has {values[1]}",
                    "use the config that it was recorded with",
                )
        if tokens % self.spec.tokens_per_step:
            size = f"{self.spec.global_batch} x {self.spec.seq_len}"
            self._refuse(
                f"holds {tokens} tokens, not a multiple of the {size} of a step",
                "give every token of every step",
            )

    def _check_ids(self, part: Part, partly: bool) -> None:
        """Refuse ids that are no experts, and an expert that a token has twice."""
        for row in range(0, len(part.experts), CHUNK):
            ids = np.sort(signed(part.experts[row : row + CHUNK]), axis=-1)
            bad = (ids < (NONE if partly else 0)) | (ids >= self.spec.experts)
            if bad.any():
                where, value = row + int(np.argwhere(bad)[0][0]), int(ids[bad][0])
                what = "no expert" if value == NONE else f"expert {value}"
                self._refuse(
                    f"gives token {where} {what}, and there are {self.spec.experts}",
                    "use the choices of this model",
                )
            twice = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] != NONE)
            if twice.any():
                where = row + int(np.argwhere(twice)[0][0])
                self._refuse(f"gives token {where} one expert twice", "write each choice once")

    def _refuse_end(self, step: int, end: int, first: int) -> None:
        self._refuse(
            f"holds no choices of step {step + 1}, and the run has {end}",
            f"use train.steps={step}" if step > first else "record more steps",
        )

    def _refuse(self, allowed: str, fix: str) -> None:
        raise ConfigError(FIELD, self.path, allowed, fix)


def open_parts(path: Path, field: str = FIELD) -> list[Part]:
    """Map the parts of a directory, or one file. Raises ConfigError or CheckpointError."""
    if not path.is_dir():
        return [open_part(path, field)]
    parts = []
    for file, first, end in list_parts(path):
        part = open_part(file, field)
        if (part.header.get("first_step"), part.header.get("steps")) != (
            str(first),
            str(end - first),
        ):
            raise CheckpointError(f"{file} holds other steps than its name says")
        parts.append(part)
    if not parts:
        allowed = "holds no choices of a run"
        fix = "give a directory that moe.replay.record has written, or a file"
        raise ConfigError(field, path, allowed, fix)
    return parts
