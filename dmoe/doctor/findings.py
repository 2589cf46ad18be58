"""One result of a check, and where tested versions and sizes come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    state: State
    """`failed`: training would not start, or would end with an error. `warning`: it would be slow,
    or end early in some cases."""
    found: str
    fix: str = ""
    """What to change; empty if nothing has to."""


def judge(check: str, found: str, *, failed: str = "", warning: str = "") -> Finding:
    """Return a finding whose state follows from the fix that is given; `ok` without one."""
    if failed:
        return Finding(check, "failed", found, failed)
    return Finding(check, "warning" if warning else "ok", found, warning)


def in_gib(size: float) -> str:
    """Format bytes in GiB."""
    return f"{size / 2**30:,.1f} GiB"
