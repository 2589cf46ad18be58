"""Commands `dmoe checkpoint inspect` and `verify`; the others are in files of their own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoe.cli.checkpoint import export, models

if TYPE_CHECKING:
    from rich.console import Console

    from dmoe.cli.checkpoint.info import CheckpointContents, CheckpointList, VerifiedCheckpoint

app = typer.Typer(
    no_args_is_help=True,
    help="Inspect checkpoints, verify their content, initialize a sparse model from a dense one.",
)

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_DIR",
        help="A run, e.g. runs/latest, its checkpoints/ directory, or one checkpoint.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
MAX_ROWS = 16


@app.command()
def inspect(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Show the newest intact checkpoint: step, data, tensors, bytes, experts by rank.

    Reads names, sizes and headers only; `dmoe checkpoint verify` hashes the bytes too. Exit code 3
    if it is damaged.

    Example: dmoe checkpoint inspect runs/latest
    """
    from dmoe.cli.checkpoint import info as checkpoint_info

    found = checkpoint_info.find_checkpoints(path)
    contents = checkpoint_info.inspect_checkpoint(checkpoint_info.newest_intact(found))
    if as_json:
        print_json({"checkpoint": asdict(contents), **_paths_json(found)})
    else:
        _print_contents(_console(), contents, found)
    sys.exit(3 if contents.problem else 0)


app.command()(export.export)
app.command("import")(models.import_model)
app.command()(models.upcycle)
app.command()(models.prune)


@app.command()
def verify(
    path: CheckpointPath,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Compare an exported directory with the published one it was made from.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hash all bytes of all checkpoints and compare with the manifests.

    With --against, RUN_OR_DIR is an exported directory: tensors that are missing, at the wrong
    place, copied or of another type are found, and any other key of config.json, and another
    tokenizer or generation config. Exit code 3 if one is damaged or wrong.

    Example: dmoe checkpoint verify runs/latest
    """
    from dmoe.cli.checkpoint import info as checkpoint_info

    if against is not None:
        export.verify_against(path, against, as_json=as_json)

    found = checkpoint_info.find_checkpoints(path)
    results = [
        result
        for path in found.checkpoints
        if (result := checkpoint_info.verify_checkpoint(path)) is not None
    ]
    ok = all(result.problem is None for result in results)
    if as_json:
        print_json(
            {
                "ok": ok,
                "checkpoints": [asdict(result) for result in results],
                "partial": [*map(str, found.partial)],
            }
        )
    else:
        _print_verified(_console(), results, found)
    sys.exit(0 if ok else 3)


def print_json(content: dict[str, Any]) -> None:
    """Print `content` as indented JSON."""
    print(json.dumps(content, indent=2))


def _paths_json(found: CheckpointList) -> dict[str, list[str]]:
    return {
        "checkpoints": [str(path) for path in found.checkpoints],
        "partial": [str(path) for path in found.partial],
    }


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _print_verified(
    console: Console, results: list[VerifiedCheckpoint], found: CheckpointList
) -> None:
    from rich.table import Table

    from dmoe.report.format import format_bytes

    table = Table(title=f"all bytes of {found.root}", title_justify="left")
    for column in ("step", "files", "bytes", ""):
        table.add_column(column, justify="left" if not column else "right")
    for result in results:
        damaged = result.problem is not None
        size = (
            ("", "")
            if damaged and not result.files
            else (str(result.files), format_bytes(result.bytes))
        )
        table.add_row(
            str(result.step),
            *size,
            "DAMAGED" if damaged else "intact",
            style="bold red" if damaged else None,
        )
    console.print(table)
    _print_partial(console, found)
    for result in results:
        if result.problem is not None:
            console.print(f"step {result.step}: {result.problem}", soft_wrap=True)
    seconds = sum(result.seconds for result in results)
    bad = sum(result.problem is not None for result in results)
    console.print(
        f"{bad} of {len(results)} damaged"
        if bad
        else f"{len(results)} of {len(results)} intact ({seconds:.1f} s)"
    )


def _print_contents(console: Console, contents: CheckpointContents, found: CheckpointList) -> None:
    from rich.table import Table

    from dmoe.report.format import format_bytes, format_ranges

    table = Table(title=contents.path, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _summary_rows(contents):
        table.add_row(name, value)
    console.print(table)
    files = Table(title="files", title_justify="left")
    for column in ("file", "bytes", "tensors", "experts"):
        files.add_column(
            column, justify="right" if column in ("bytes", "tensors") else "left", overflow="fold"
        )
    for shard in _first_rows(contents.files):
        files.add_row(
            shard.name,
            format_bytes(shard.size),
            str(len(shard.pieces)),
            format_ranges(shard.experts) or "none",
        )
    console.print(files)
    if len(contents.files) > MAX_ROWS:
        console.print(
            f"and {len(contents.files) - MAX_ROWS} more (--json lists all files and their tensors)"
        )
    _print_partial(console, found)
    if len(found.checkpoints) > 1:
        console.print(
            f"checkpoints: {', '.join(path.name for path in found.checkpoints)}", soft_wrap=True
        )
    console.print(
        "intact by names and sizes; `dmoe checkpoint verify` hashes all bytes"
        if contents.problem is None
        else f"DAMAGED: {contents.problem}",
        soft_wrap=True,
    )


def _print_partial(console: Console, found: CheckpointList) -> None:
    for path in found.partial:
        console.print(
            f"{path.name} is partial: its save is running or was interrupted; it is never loaded",
            soft_wrap=True,
        )


def _summary_rows(contents: CheckpointContents) -> list[tuple[str, str]]:
    """Return the rows of the table; missing values are `not recorded`."""
    from dmoe.report.format import format_bytes, format_count, format_ranges

    def bytes_of(parts: dict[str, int]) -> str:
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())

    def values_of(parts: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in parts.items()) or "not recorded"

    layers = (
        f"{len(contents.layers)} x {format_ranges(sorted(set(contents.layers.values())))} experts"
        if contents.layers
        else "none"
    )
    rows = [
        ("step", str(contents.step)),
        ("tokens", "not recorded" if contents.tokens is None else f"{contents.tokens:,}"),
        ("written", contents.written),
        ("data", contents.data or "not recorded"),
        ("saved by", values_of(contents.topology)),
        ("versions", values_of(contents.versions)),
        ("tensors", f"{contents.tensors:,}"),
        ("parameters", format_count(contents.parameters)),
        ("bytes", bytes_of(contents.bytes_by_kind)),
        ("by type", bytes_of(contents.bytes_by_dtype)),
        ("MoE layers", layers),
    ]
    for owner in _first_rows(contents.owners):
        rows.append(
            (
                f"EP rank {owner['ep_rank']}",
                f"experts {format_ranges(owner['experts'])}; rank {format_ranges(owner['ranks'])}",
            )
        )
    return rows


def _first_rows(items: list[Any]) -> list[Any]:
    return items[:MAX_ROWS]
