"""The summary at the start of a run, and the result table at its end."""

from __future__ import annotations

from typing import Any

from dmoe.config.plugins import describe, get, options_field, references
from dmoe.config.schedule import schedule_remarks
from dmoe.config.schema import Config
from dmoe.observability import run_with_timeout
from dmoe.observability.logger import RunLogger
from dmoe.runs.provenance import describe_provenance
from dmoe.train.checkpointer import Checkpointer
from dmoe.train.engine import Engine
from dmoe.train.modular.session import ModularSession
from dmoe.train.run_session import RunSession
from dmoe.train.tasks import DataSplits

MAX_SECONDS = 10.0
"""Time limit of reading the metrics for the result table: the other ranks wait meanwhile."""


def log_start(
    logger: RunLogger,
    engine: Engine,
    data: DataSplits,
    session: RunSession,
    checkpointer: Checkpointer,
    modular: ModularSession,
) -> None:
    """Print what is trained, on what and where, and log the `start` or `restart` event.

    Args:
        logger: where to.
        engine: model, ranks and config.
        data: described in one line.
        session: the run directory, and a warning about its lock.
        checkpointer: notes on what was resumed.
        modular: the number of parameters that training changes.
    """
    counts, process = engine.model.num_parameters(), engine.process
    start_step = max(0, checkpointer.last_saved_step)
    logger.print(f"data: {data.describe()}")
    for field, reference in references(engine.config).items():
        options = get(engine.config, options_field(field))
        logger.print(f"code: {field}={describe(str(reference), options)}")
    logger.print(
        f"model: {counts.total / 1e6:.2f} M parameters, "
        f"{counts.active / 1e6:.2f} M active per token; "
        f"{engine.precision} on {process.device.type}"
    )
    logger.print(
        f"ranks: {engine.mesh}; {engine.config.train.global_batch} sequences per step = "
        f"{process.world_size} x {engine.sequences_per_forward} x "
        f"{engine.batching.accumulation} accumulated"
    )
    foreseen = expected_surprises(engine.config, data, start_step)
    for note in filter(
        None, (session.lock_warning, *checkpointer.notes, *engine.model.notes, *foreseen)
    ):
        logger.note(start_step, note)
    resumed = f"resumed after step {start_step}; " if start_step else ""
    logger.print(f"{resumed}run directory: {session}")
    values: dict[str, Any] = {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "trainable_parameters": modular.num_trained(counts.trainable),
        "flops_per_token": engine.model.flops_per_token(engine.task.targets_per_sample),
        "task": engine.task.name,
        "world": process.world_size,
        "ep": engine.mesh.ep,
        "precision": engine.precision,
        "device": process.device.type,
        "vocabulary": engine.task.num_outputs,
        "data": data.fingerprint,
        "resumed_from": start_step,
        "attempt": process.restart_count,
    }
    if process.is_main:
        values |= describe_provenance()
    event = "restart" if start_step or process.restart_count else "start"
    logger.log_event(event, start_step, values)


def expected_surprises(config: Config, data: DataSplits, start_step: int) -> list[str]:
    """List what this run will do although its config seems to say otherwise.

    Args:
        config: the whole config.
        data: its number of training sequences.
        start_step: optimizer steps done.
    """
    train, num_sequences = config.train, data.train.num_sequences
    if start_step >= train.steps:
        return [
            f"train.steps={train.steps}: the run has done all of them, so nothing is trained, and "
            "it is evaluated again; use more to train on"
        ]
    notes = schedule_remarks(config.optim, train.steps)
    if num_sequences is not None and train.global_batch > num_sequences:
        unit = "samples" if train.task == "classification" else "sequences"
        notes.append(
            f"train.global_batch={train.global_batch}: there are {num_sequences} training {unit}, "
            f"so a step reads each of them {train.global_batch / num_sequences:.3g} times; use "
            f"{num_sequences} or fewer, or more text"
        )
    return notes


def print_summary(logger: RunLogger) -> None:
    """Print the result table, which `dmoe compare --full` prints later too.

    A table that cannot be made is a note: the run is trained and saved.
    """
    if logger.metrics is None:
        return
    lines: list[str] = []
    problem = run_with_timeout(
        lambda: _read_results(logger, lines),
        MAX_SECONDS,
        f"it takes more than {MAX_SECONDS:g} seconds",
    )
    note = f"note: no result table: {problem}; see dmoe compare --full"
    logger.print(note if problem else "\n".join(["", *lines]))


def _read_results(logger: RunLogger, lines: list[str]) -> str | None:
    """Append the table to `lines`; return why that failed, or None."""
    # Imported here: only the end of a run needs them.
    from dmoe.report.results import result_lines
    from dmoe.report.run import MAX_LAYER_LINES
    from dmoe.runs.metrics_log import read_metrics_tolerant

    try:
        lines += result_lines(read_metrics_tolerant(logger.run.metrics, MAX_LAYER_LINES))
    except Exception as error:  # whatever it is: the run is trained and saved
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None
