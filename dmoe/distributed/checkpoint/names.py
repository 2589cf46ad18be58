"""Names inside `checkpoints/`: `step-00000100` is a checkpoint, `step-00000100.tmp` is one still being written."""

from __future__ import annotations

import re

__all__ = ["FILE", "partial_name", "step_name", "step_of"]

# What a file of a checkpoint may be called: a base name, so that no manifest can point outside its directory.
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

_STEP = re.compile(r"step-([0-9]{8,18})(\.tmp)?")


def step_name(step: int) -> str:
    """The directory name of the checkpoint taken after `step` optimizer steps."""
    assert 0 <= step < 10**18, f"step {step} has no name"
    return f"step-{step:08d}"


def partial_name(step: int) -> str:
    """The name that a checkpoint has until its last byte is on disk."""
    return step_name(step) + ".tmp"


def step_of(name: str) -> tuple[int, bool] | None:
    """`(step, is_partial)` of a directory name, or None where it is no checkpoint's name.

    The number must be written as `step_name` writes it: otherwise `step-000000007` and `step-00000007` would both be step 7.
    """
    match = _STEP.fullmatch(name)
    if match is None:
        return None
    step, partial = int(match[1]), match[2] is not None
    return (step, partial) if name == (partial_name(step) if partial else step_name(step)) else None
