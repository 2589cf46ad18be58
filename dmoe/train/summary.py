"""The result table at the end of a run, from the lines that the run has written: `dmoe compare --full` shows the same later."""

from __future__ import annotations

from dmoe.observability.logger import RunLogger
from dmoe.observability.trackers.time_limit import bounded

SECONDS = 10.0
"""Reading the lines may take: other ranks wait meanwhile."""


def print_summary(logger: RunLogger) -> None:
    """Print it, where there is somebody to read it. A table that cannot be made is a note: the run is trained and saved."""
    if logger.metrics is None:
        return
    lines: list[str] = []
    problem = bounded(
        lambda: _read(logger, lines), SECONDS, f"it takes more than {SECONDS:g} seconds"
    )
    logger.print(
        f"note: no result table: {problem}; see dmoe compare --full"
        if problem
        else "\n".join(["", *lines])
    )


def _read(logger: RunLogger, lines: list[str]) -> str | None:
    """Fill `lines`; why that was not possible, or None."""
    from dmoe.report.results import result_lines
    from dmoe.runs.metrics_log import read_metrics_tolerant  # what only the end of a run needs

    try:
        lines += result_lines(read_metrics_tolerant(logger.run.metrics))
    except Exception as error:  # whatever it is: the run is trained and saved
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
