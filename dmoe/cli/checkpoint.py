"""`dmoe checkpoint inspect|verify|upcycle`

`dmoe checkpoint upcycle`
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoe.cli.common import ARGUMENTS_HELP, load_arguments

if TYPE_CHECKING:
    from dmoe.train.upcycle import UpcycleResult


def upcycle(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The run of a dense model (model.moe_every=0).")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint of this step. Default: the newest whole one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
) -> None:
    """Begin a mixture of experts with the weights of a dense run: every expert is a copy of its feed-forward.

    CONFIG is that of the mixture. Its train.run_dir is made, with a checkpoint of step 0 that says what the dense model says; dmoe
    train with the same CONFIG and train.run_dir goes on from there, on any number of ranks.

    Example: dmoe checkpoint upcycle runs/dense configs/seeds/upcycle.yaml train.run_dir=runs/sparse
    """
    config, given = load_arguments(arguments or [])

    from dmoe.runs.directory import find_run
    from dmoe.train.upcycle import upcycle as make

    made = make(find_run(run), config, given, step)
    print(json.dumps(asdict(made), indent=2) if as_json else told(made))


def told(made: UpcycleResult) -> str:
    from dmoe.report.format import format_count

    return (
        f"{len(made.layers)} feed-forwards of {made.source}, step {made.step}, copied to {made.experts} experts each: "
        f"{format_count(made.dense_parameters)} parameters are now {format_count(made.parameters)}\n"
        f"held-out logits differ by at most {made.difference:.1e}\n"
        f"go on with the same CONFIG and train.run_dir={made.path}"
    )


if TYPE_CHECKING:
    from rich.console import Console

    from dmoe.train.checkpoint_info import CheckpointContents, CheckpointList, VerifiedCheckpoint


app = typer.Typer(
    no_args_is_help=True, help="Say what a checkpoint holds, prove that it is whole, go on from it."
)

Place = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_DIR",
        help="A run, e.g. runs/latest, its checkpoints/ directory, or one checkpoint.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")]
MOST_ROWS = 16


@app.command()
def inspect(place: Place, as_json: AsJson = False) -> None:
    """Say what the newest whole checkpoint holds: step, data, tensors, bytes, and which rank held which experts.

    Looks at names, sizes and headers only; `dmoe checkpoint verify` hashes the bytes too. Exit code 3 if it is damaged.

    Example: dmoe checkpoint inspect runs/latest
    """
    from dmoe.train import checkpoint_info

    found = checkpoint_info.find_checkpoints(place)
    contents = checkpoint_info.inspect_checkpoint(checkpoint_info.newest_intact(found))
    if as_json:
        print_json({"checkpoint": asdict(contents), **_listed(found)})
    else:
        _print_contents(_console(), contents, found)
    sys.exit(3 if contents.problem else 0)


@app.command()
def verify(place: Place, as_json: AsJson = False) -> None:
    """Hash every byte of every checkpoint there, and compare with what was written. Exit code 3 if one is not whole.

    Example: dmoe checkpoint verify runs/latest
    """
    from dmoe.train import checkpoint_info

    found = checkpoint_info.find_checkpoints(place)
    proofs = [
        proof for path in found.checkpoints if (proof := checkpoint_info.verify_checkpoint(path)) is not None
    ]
    ok = all(proof.problem is None for proof in proofs)
    if as_json:
        print_json(
            {
                "ok": ok,
                "checkpoints": [asdict(proof) for proof in proofs],
                "partial": [*map(str, found.partial)],
            }
        )
    else:
        _print_proofs(_console(), proofs, found)
    sys.exit(0 if ok else 3)


app.command()(upcycle)


def print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))


def _listed(found: CheckpointList) -> dict[str, list[str]]:
    return {
        "checkpoints": [str(path) for path in found.checkpoints],
        "partial": [str(path) for path in found.partial],
    }


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


def _print_proofs(console: Console, proofs: list[VerifiedCheckpoint], found: CheckpointList) -> None:
    from rich.table import Table

    from dmoe.report.format import format_bytes

    table = Table(title=f"every byte of {found.root}", title_justify="left")
    for column in ("step", "files", "bytes", ""):
        table.add_column(column, justify="left" if not column else "right")
    for proof in proofs:
        damaged = proof.problem is not None
        known = (
            ("", "")
            if damaged and not proof.files
            else (str(proof.files), format_bytes(proof.bytes))
        )
        table.add_row(
            str(proof.step),
            *known,
            "DAMAGED" if damaged else "whole",
            style="bold red" if damaged else None,
        )
    console.print(table)
    _print_partial(console, found)
    for proof in proofs:
        if proof.problem is not None:
            console.print(f"step {proof.step}: {proof.problem}", soft_wrap=True)
    seconds = sum(proof.seconds for proof in proofs)
    bad = sum(proof.problem is not None for proof in proofs)
    console.print(
        f"{bad} of {len(proofs)} not whole"
        if bad
        else f"{len(proofs)} of {len(proofs)} whole ({seconds:.1f} s)"
    )


def _print_contents(console: Console, contents: CheckpointContents, found: CheckpointList) -> None:
    from rich.table import Table

    from dmoe.report.format import format_bytes, format_ranges

    table = Table(title=contents.path, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in _facts(contents):
        table.add_row(name, value)
    console.print(table)
    files = Table(title="files", title_justify="left")
    for column in ("file", "bytes", "tensors", "experts"):
        files.add_column(
            column, justify="right" if column in ("bytes", "tensors") else "left", overflow="fold"
        )
    for shard in _some(contents.files):
        files.add_row(
            shard.name,
            format_bytes(shard.size),
            str(len(shard.pieces)),
            format_ranges(shard.experts) or "none",
        )
    console.print(files)
    if len(contents.files) > MOST_ROWS:
        console.print(
            f"and {len(contents.files) - MOST_ROWS} more (--json names them all, and every tensor in each)"
        )
    _print_partial(console, found)
    if len(found.checkpoints) > 1:
        console.print(
            f"checkpoints: {', '.join(path.name for path in found.checkpoints)}", soft_wrap=True
        )
    console.print(
        "whole, by names and sizes; `dmoe checkpoint verify` hashes every byte"
        if contents.problem is None
        else f"DAMAGED: {contents.problem}",
        soft_wrap=True,
    )


def _print_partial(console: Console, found: CheckpointList) -> None:
    for path in found.partial:
        console.print(
            f"{path.name} is partial: a save that runs, or was cut short; nothing reads it",
            soft_wrap=True,
        )


def _facts(contents: CheckpointContents) -> list[tuple[str, str]]:
    """Rows of the table; what the checkpoint does not say is `not said`."""
    from dmoe.report.format import format_bytes, format_count, format_ranges

    def bytes_of(parts: dict[str, int]) -> str:
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())

    def said(parts: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in parts.items()) or "not said"

    layers = (
        f"{len(contents.layers)} x {format_ranges(sorted(set(contents.layers.values())))} experts"
        if contents.layers
        else "none"
    )
    rows = [
        ("step", str(contents.step)),
        ("tokens", "not said" if contents.tokens is None else f"{contents.tokens:,}"),
        ("written", contents.written),
        ("data", contents.data or "not said"),
        ("saved by", said(contents.topology)),
        ("versions", said(contents.versions)),
        ("tensors", f"{contents.tensors:,}"),
        ("parameters", format_count(contents.parameters)),
        ("bytes", bytes_of(contents.bytes_by_kind)),
        ("by type", bytes_of(contents.bytes_by_dtype)),
        ("MoE layers", layers),
    ]
    for owner in _some(contents.owners):
        rows.append(
            (
                f"EP rank {owner['ep_rank']}",
                f"experts {format_ranges(owner['experts'])}; rank {format_ranges(owner['ranks'])}",
            )
        )
    return rows


def _some(items: list[Any]) -> list[Any]:
    return items[:MOST_ROWS]
