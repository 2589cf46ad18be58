"""What every training run has: loss and bits per byte or accuracy, gradients, time, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from dmoe.report.curves import Reader, by_run, overlay
from dmoe.report.metrics import Line, number
from dmoe.report.page import Chart, Panel, Table
from dmoe.report.results import domain_rows
from dmoe.report.run import Run

__all__ = ["gradients", "quality", "time"]

PIECES = ("data", "forward", "backward", "exchange", "optimizer", "other")


def at(*path: str) -> Reader:
    return partial(_at, path)


def _at(path: tuple[str, ...], line: Line) -> float | None:
    return number(line, *path)


def panel(id: str, title: str, charts: Sequence[Chart | None], absent: str, words: Sequence[str] = ()) -> Panel:
    """A panel of what there is; `absent` is said where there is nothing."""
    found = [chart for chart in charts if chart is not None]
    return Panel(id, title, words if found else [absent], charts=found)


def quality(runs: Sequence[Run]) -> Panel:
    """Loss, and what people read beside it; a run has bits per byte or accuracy, by its task."""
    told = "Points with markers are held-out data, the other line is the training batch of that step."
    caption = f"Lower is better. {told}"
    found = panel(
        "quality",
        "Loss, bits per byte, accuracy",
        [
            overlay("loss", "Loss", caption, "nats a target", runs, {"training": at("loss")}, held_out=at("loss")),
            overlay(
                "bits-per-byte",
                "Bits per byte",
                caption + " Comparable between tokenizers.",
                "bits a byte",
                runs,
                {"training": at("bits_per_byte")},
                held_out=at("bits_per_byte"),
            ),
            overlay(
                "accuracy",
                "Accuracy",
                f"Share of the targets that were guessed right; higher is better. {told}",
                "share",
                runs,
                {"training": at("accuracy")},
                held_out=at("accuracy"),
            ),
        ],
        "No step of training and no evaluation was recorded.",
    )
    return replace(found, tables=[table for run in runs if (table := _by_domain(run, len(runs))) is not None])


def _by_domain(run: Run, runs: int) -> Table | None:
    """Each domain at the first evaluation and at the last one; `=` where nothing has changed to the last bit."""
    head, rows = domain_rows(run.evals)
    title = "Held out, by domain" + (f", {run.name}" if runs > 1 else "")
    return Table(title, [name.replace("\n", " ") for name in head], rows) if len(rows) > 1 else None


def gradients(runs: Sequence[Run]) -> Panel:
    norms = {
        "all": at("grad_norm"),
        "dense": at("grad_norm_dense"),
        "experts": at("grad_norm_experts"),
        "router": at("grad_norm_router"),
    }
    return panel(
        "gradients",
        "Gradients and learning rate",
        [
            overlay("grad-norm", "Gradient norm", "Before clipping; of all parameters and of each class.", "norm", runs, norms),
            overlay(
                "clip",
                "Clip factor",
                "What the gradient was multiplied by; 1 where it was short enough.",
                "factor",
                runs,
                {"": at("clip_factor")},
            ),
            overlay("lr", "Learning rate", "As the schedule gave it for each step.", "rate", runs, {"": at("lr")}),
        ],
        "No gradient norm was recorded.",
    )


def time(runs: Sequence[Run]) -> Panel:
    pieces = {piece: at("step_time", piece) for piece in PIECES}
    charts = [
        overlay(
            "speed",
            "Tokens a second",
            "Over all ranks, evaluations and saves left out.",
            "tokens/s",
            runs,
            {"": at("tokens_per_second")},
        ),
        by_run("time-split", "Where a step's time goes", "Seconds of one step, stacked.", "s a step", runs, pieces, stack=True),
        overlay(
            "straggler",
            "Straggler factor",
            "The slowest rank's time over the mean; 1 means that none waits.",
            "factor",
            runs,
            {"": at("straggler")},
        ),
        overlay(
            "exchanged", "Bytes exchanged", "Sent between ranks in one step.", "bytes a step", runs, {"": at("bytes_exchanged")}
        ),
        overlay("memory", "Memory", "The peak of the fullest rank.", "bytes", runs, {"": at("memory")}),
        overlay(
            "mfu",
            "Model FLOP utilisation",
            "Share of the measured peak that useful arithmetic took.",
            "share",
            runs,
            {"": at("mfu")},
        ),
    ]
    split = (
        "" if any(chart and chart.id == "time-split" for chart in charts) else "The split of the step time was not recorded."
    )
    return panel("time", "Time, bytes and memory", charts, "No speed was recorded.", [split] if split else [])
