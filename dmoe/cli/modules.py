"""`dmoe modules list|export|add|merge`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import TrustCode, decimal, integer
from dmoe.config.errors import ConfigError
from dmoe.config.yaml_guard import NUMBER

if TYPE_CHECKING:
    from dmoe.runs.directory import RunDir
    from dmoe.train.modular.commands import TargetSummary


app = typer.Typer(
    no_args_is_help=True,
    help="List the modules of a run, export them, add others, or merge them.",
)

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/latest.")]
NewRun = Annotated[str, typer.Option("--to", help="A new run directory.")]


@app.command(name="list")
def show(
    source: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_FILE", help="A run, e.g. runs/latest, or a module file."),
    ],
    trust_code: TrustCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> None:
    """List the target modules with their bank, router, aggregation and size.

    Example: dmoe modules list runs/latest
    """
    path = Path(source) if Path(source).is_file() else _run(source).path

    from dmoe.train.modular.commands import list_modules

    targets = list_modules(path, trust_code=trust_code)
    if as_json:
        print(json.dumps({"places": [asdict(target) for target in targets]}, indent=2))
    else:
        _print_table(source, targets)


@app.command()
def export(
    run: Run,
    to: Annotated[str | None, typer.Option(help="A .safetensors file for all modules.")] = None,
    peft: Annotated[
        str | None, typer.Option(help="A folder for one low-rank module, in peft's format.")
    ] = None,
    module: Annotated[int, typer.Option(help="The module to write to --peft.", **integer())] = 0,
    trust_code: TrustCode = False,
) -> None:
    """Write modules without the network: all into a file, or one in peft's format.

    The file records the hash of the base model.

    Example: dmoe modules export runs/latest --to modules.safetensors
    """
    if (to is None) == (peft is None):
        raise ConfigError(
            "--to", to, "exactly one of --to FILE and --peft DIR is needed", "give one of them"
        )
    directory = _run(run)

    from dmoe.train.modular import commands

    if to is not None:
        base_model = commands.export_modules(directory, Path(to), trust_code=trust_code)
        print(f"{to}: the modules of base model {base_model[:12]}")
    else:
        assert peft is not None
        commands.export_module_to_peft(directory, module, Path(peft), trust_code=trust_code)
        print(f"{peft}: module {module}, as peft.PeftModel.from_pretrained loads it")


@app.command()
def add(
    run: Run,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Module files of the same base model.")
    ],
    to: NewRun,
    trust_code: TrustCode = False,
) -> None:
    """Append saved modules to those of a run, in a new run directory; continue by modular.core=DIR.

    A learned router is not trained for them yet (use modular.train=router), constant weights are 0,
    and a table contains them if modular.table does.

    Example: dmoe modules add runs/french german.safetensors --to runs/both
    """
    directory = _run(run)

    from dmoe.train.modular.commands import add_modules_to_run

    paths = [Path(file) for file in files]
    count = add_modules_to_run(directory, paths, Path(to), trust_code=trust_code)
    print(f"{to}: {count} modules; train with modular.core={to} modular.modules={count}")


@app.command(name="merge")
def merge_command(
    run: Run,
    weights: Annotated[str, typer.Option(help="One weight per module, e.g. 0.5,0.5.")],
    to: NewRun,
    trust_code: TrustCode = False,
) -> None:
    """Merge the modules into the weights of the network, in a new run directory without modules.

    Works for low_rank, sparse_delta and scale beside linear maps (modular.at=*.attention.w_*).

    Example: dmoe modules merge runs/latest --weights 0.5,0.5 --to runs/merged
    """
    numbers = _parse_numbers(weights)
    directory = _run(run)

    from dmoe.train.modular.commands import merge_run

    merge_run(directory, numbers, Path(to), trust_code=trust_code)
    print(f"{to}: the merged network; dmoe generate {to}, or modular.core={to}")


def _run(path: str) -> RunDir:
    from dmoe.runs.directory import find_run

    return find_run(path)


def _parse_numbers(text: str) -> list[float]:
    try:
        numbers = [float(decimal(part, NUMBER)) for part in text.split(",")]
    except typer.BadParameter:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError("--weights", text, "must be comma-separated numbers", "e.g. 0.5,0.5")
    return numbers


def _print_table(source: str, targets: list[TargetSummary]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=source, title_justify="left")
    for column in ("place", "bank", "router", "aggregation", "modules", "parameters"):
        table.add_column(
            column,
            justify="right" if column in ("modules", "parameters") else "left",
            overflow="fold",
        )
    for target in targets:
        table.add_row(
            target.place,
            target.bank,
            target.router,
            target.aggregation,
            str(target.modules),
            f"{target.parameters:,}",
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    parameters = sum(target.parameters for target in targets)
    console.print(f"{parameters:,} parameters in the modules of {len(targets)} target modules")
