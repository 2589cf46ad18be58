"""`dmoe modules list|export|add|merge`"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.config.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.runs.directory import RunDir
    from dmoe.train.modular.commands import Place


app = typer.Typer(
    no_args_is_help=True,
    help="Say what modules a run has, take them out, put others in, merge them.",
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/latest.")]
NewRun = Annotated[str, typer.Option("--to", help="A new run directory.")]


@app.command(name="list")
def show(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_FILE", help="A run, e.g. runs/latest, or a file of modules."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
) -> None:
    """Say where the modules stand, what they are, who chooses among them, and how large they are.

    Example: dmoe modules list runs/latest
    """
    path = Path(source) if Path(source).is_file() else _run(source).path

    from dmoe.train.modular.commands import places

    found = places(path)
    if as_json:
        print(json.dumps({"places": [asdict(place) for place in found]}, indent=2))
    else:
        _print(source, found)


@app.command()
def export(
    run: Run,
    to: Annotated[str | None, typer.Option(help="A .safetensors file for all modules.")] = None,
    peft: Annotated[
        str | None, typer.Option(help="A folder for one low-rank module, in the format of peft.")
    ] = None,
    module: Annotated[int, typer.Option(help="Which module goes into --peft.")] = 0,
) -> None:
    """Write modules without the network: all of them into a file with the hash of their core, or one for peft.

    Example: dmoe modules export runs/latest --to modules.safetensors
    """
    if (to is None) == (peft is None):
        raise ConfigError(
            "--to", to, "one of --to FILE and --peft DIR says where to", "give one of them"
        )
    directory = _run(run)

    from dmoe.train.modular import commands

    if to is not None:
        core = commands.export_modules(directory, Path(to))
        print(f"{to}: the modules of core {core[:12]}")
    else:
        assert peft is not None
        commands.export_to_peft(directory, module, Path(peft))
        print(f"{peft}: module {module}, as peft.PeftModel.from_pretrained loads it")


@app.command()
def add(
    run: Run,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files of modules of the same core.")
    ],
    to: NewRun,
) -> None:
    """Put saved modules behind those of a run, into a new run directory, from which modular.core=DIR goes on.

    A learned router does not know them yet (modular.train=router teaches it), constant weights are 0, and a table names them
    when modular.table does.

    Example: dmoe modules add runs/french german.safetensors --to runs/both
    """
    directory = _run(run)

    from dmoe.train.modular.commands import add_modules

    count = add_modules(directory, [Path(file) for file in files], Path(to))
    print(f"{to}: {count} modules; train with modular.core={to} modular.modules={count}")


@app.command(name="merge")
def merge_command(
    run: Run,
    weights: Annotated[str, typer.Option(help="One number for each module, e.g. 0.5,0.5.")],
    to: NewRun,
) -> None:
    """Write the modules into the weights of the network, each with its weight: a new run directory without modules.

    Works for low_rank, sparse_delta and scale beside linear maps (modular.at=*.attention.w_*).

    Example: dmoe modules merge runs/latest --weights 0.5,0.5 --to runs/merged
    """
    numbers = _numbers(weights)
    directory = _run(run)

    from dmoe.train.modular.commands import merge_modules

    merge_modules(directory, numbers, Path(to))
    print(f"{to}: the plain network; dmoe generate {to}, or modular.core={to}")


def _run(path: str) -> RunDir:
    from dmoe.runs.directory import find_run

    return find_run(path)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(
            "--weights", text, "must be numbers with commas between them", "e.g. 0.5,0.5"
        )
    return numbers


def _print(source: str, found: list[Place]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=source, title_justify="left")
    for column in ("place", "bank", "router", "aggregation", "modules", "parameters"):
        table.add_column(
            column,
            justify="right" if column in ("modules", "parameters") else "left",
            overflow="fold",
        )
    for place in found:
        table.add_row(
            place.place,
            place.bank,
            place.router,
            place.aggregation,
            str(place.modules),
            f"{place.parameters:,}",
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"{sum(place.parameters for place in found):,} parameters in modules at {len(found)} places"
    )
