"""Command `dmoe verify`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import ARGUMENTS_HELP, decimal, load_arguments
from dmoe.config.errors import ConfigError
from dmoe.config.rules import check
from dmoe.config.yaml_guard import INTEGER

if TYPE_CHECKING:
    from dmoe.verify.verify import Report


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    worlds: Annotated[
        str, typer.Option(help="Numbers of ranks to start, separated by commas.")
    ] = "1,2,4",
    dtype: Annotated[
        str, typer.Option(help="float64 (tolerance 1e-10) or float32 (1e-5; 1e-4 after Adam).")
    ] = "float64",
    device: Annotated[
        str, typer.Option(help="cpu (gloo), or cuda (NCCL, one GPU per rank) against the CPU.")
    ] = "cpu",
    full: Annotated[
        bool, typer.Option("--full", help="Keep the config's widths and number of experts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Verify that one process and N ranks train the same model with this config.

    Starts ranks for each number of ranks and expert-parallel size, with both exchanges and both
    data-parallel modes. Compares every layer, loss, gradients, norm, clip, counts, bias,
    optimizer, two steps and checkpoints with one process that computes layer and step naively. If
    they differ, the exit code is 1 and the first difference is printed.

    Example: dmoe verify configs/olmoe_1b_7b.yaml --worlds 1,2,4
    """
    config, _ = load_arguments(arguments or [])
    check(config, config.parallel.ep if isinstance(config.parallel.ep, int) else 1)
    world_sizes = _parse_worlds(worlds)
    if dtype not in ("float64", "float32"):
        raise ConfigError("--dtype", dtype, "must be float64 or float32", "use float64")
    if device not in ("cpu", "cuda"):
        raise ConfigError("--device", device, "must be cpu or cuda", "use cpu")
    from dmoe.verify.verify import verify

    report = verify(config, world_sizes, dtype=dtype, device=device, full=full)
    if as_json:
        print(json.dumps(asdict(report) | {"ok": report.ok}, indent=2))
    else:
        print_report(report)
    sys.exit(0 if report.ok else 1)


def _parse_worlds(worlds: str) -> list[int]:
    try:
        sizes = sorted({int(decimal(part, INTEGER)) for part in worlds.split(",")})
    except typer.BadParameter:
        sizes = []
    if not sizes or sizes[0] < 1 or sizes[-1] > 64:
        raise ConfigError(
            "--worlds",
            worlds,
            "must be numbers of ranks from 1 to 64, separated by commas",
            "use 1,2,4",
        )
    return sizes


def print_report(report: Report) -> None:
    """Print the table of quantities and the first difference."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(
        title=f"one process = N ranks?  {report.dtype}, {len(report.cases)} cases",
        title_justify="left",
    )
    for column in ("quantity", "worst difference", "allowed", ""):
        table.add_column(
            column, justify="right" if "difference" in column or column == "allowed" else "left"
        )
    for row in report.rows:
        mark = "[green]equal[/green]" if row.ok else "[bold red]DIFFERENT[/bold red]"
        if row.follows:
            mark = "[red]follows[/red]"
        table.add_row(
            row.quantity,
            f"{row.size:.1e}" if row.size else "0",
            f"{row.tolerance:.0e}" if row.tolerance else "0",
            mark,
        )
    console.print(table)
    for case, reason in report.refused.items():
        console.print(f"not run: {case}: {reason}", markup=False)
    for case, tie in report.undecided.items():
        console.print(f"undecided: {case}: {tie}", markup=False)
    if report.first is None:
        cases = "every other case" if report.undecided else "every case"
        console.print(f"{cases} trains the same model ({report.seconds:.0f} s)")
    else:
        first = report.first
        console.print(
            f"\nfirst difference: {first.quantity}, {first.size:.3g}, in {first.case}", markup=False
        )
        console.print(f"  where:  {first.where}\n  likely: {first.cause}", markup=False)
