"""Command `dmoe evaluate`."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import TrustCode, integer
from dmoe.cli.runs import terminal_width
from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import read_launch_env
from dmoe.distributed.launcher import exit_with_launcher
from dmoe.report.format import text_table
from dmoe.runs.directory import find_run

if TYPE_CHECKING:
    from dmoe.train.evaluation.checkpoint import RunEvaluation

COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "perplexity": ("perplexity", "{:,.4f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "tokens": ("targets", "{:,.0f}"),
}
"""Title and format of each value of a row."""


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/latest.")],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text to evaluate whole, as data.source. Default: the run's held-out split.",
        ),
    ] = None,
    checkpoint: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint of this step. Default: the newest intact one.",
            **integer(0) | {"metavar": "STEP"},
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            help="How many, from the first. Default: all of --data, else train.eval_sequences.",
            **integer(1),
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Start this many local processes.", **integer(1))
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, with all digits.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Evaluate a trained model: loss, bits per byte and perplexity by domain, load and drops.

    Without --data the result is that of the run's own evaluation. Writes nothing to RUN.

    Example: dmoe evaluate runs/latest --data guide:de
    """
    exit_with_launcher()
    directory = find_run(run)
    if ranks is not None:
        if read_launch_env() is not None:
            allowed = "a launcher has already set the world size"
            raise ConfigError("--ranks", ranks, allowed, "leave --ranks out under torchrun")
        from dmoe.distributed.launcher import launch

        options = [*(["--data", data] if data is not None else [])]
        options += ["--checkpoint", str(checkpoint)] if checkpoint is not None else []
        options += ["--sequences", str(sequences)] if sequences is not None else []
        options += ["--json"] * as_json + ["--trust-code"] * trust_code
        sys.exit(launch(ranks, ["evaluate", run, *options]))

    from dmoe.distributed.init import shutdown
    from dmoe.train.evaluation.checkpoint import evaluate_run

    result = evaluate_run(
        directory, checkpoint, source=data, sequences=sequences, trust_code=trust_code
    )
    shutdown()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result.record()) if as_json else "\n".join(as_text(result)))


def as_text(result: RunEvaluation) -> list[str]:
    """Return the result as tables: all data and each domain, then each MoE layer."""
    width = terminal_width()
    total = {"loss": result.loss, **result.metrics, "tokens": result.evaluation.targets}
    shown = [name for name in COLUMNS if name in total]
    head = ["", *(COLUMNS[name][0] for name in shown)]
    rows = [
        [name, *(COLUMNS[key][1].format(values[key]) for key in shown)]
        for name, values in {"all": total, **result.by_domain}.items()
    ]
    lines = [f"step {result.step}: {result.data}", "", *text_table(head, rows, width)]
    missing = result.evaluation.missing_stream_accuracy.items()
    lines += [f"without {stream}: accuracy {value:.2%}" for stream, value in missing]
    if result.layers:
        cells = [
            [str(layer["layer"]), f"{layer['load_max_over_mean']:.2f}", f"{layer['drop_rate']:.2%}"]
            for layer in result.layers
        ]
        lines += ["", *text_table(["MoE layer", "load max/mean", "dropped"], cells, width)]
    return lines
