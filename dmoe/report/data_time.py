"""Share of the step time that goes into reading data."""

from __future__ import annotations

from collections.abc import Sequence

from dmoe.report.run import as_dict
from dmoe.runs.metrics_log import Line, number


def data_share(train: Sequence[Line]) -> float | None:
    """Return seconds of reading batches over seconds of all parts, summed over the logged steps.

    Loading is no hidden cost: batches are read where the step begins, in the same process, so this
    is the time that is lost to it. None if no step time was recorded.
    """
    parts = [as_dict(line.get("step_time")) for line in train]
    total = sum(number(part, name) or 0.0 for part in parts for name in part)
    return sum(number(part, "data") or 0.0 for part in parts) / total if total else None
