"""Command `dmoe simulate`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoe.cli.common import (
    ARGUMENTS_HELP,
    TrustCode,
    decimal,
    load_arguments,
    load_with_run,
    read_factor,
)
from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import read_launch_env
from dmoe.config.rules import check
from dmoe.config.rules.layer import check_layer
from dmoe.config.schema import Config
from dmoe.config.schema.constraints import check_bounds
from dmoe.config.yaml_guard import INTEGER, NUMBER
from dmoe.report.format import BYTES_PER_NUMBER, format_bytes, format_duration, text_table
from dmoe.runs.metrics_log import read_metrics

if TYPE_CHECKING:
    from dmoe.simulation.replay import Setting
    from dmoe.simulation.trace import Trace


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="W[,W...]",
            help="Number of ranks; several for --replay. Default: those of the trace's run.",
        ),
    ] = None,
    ep: Annotated[
        str | None,
        typer.Option(
            metavar="EP[,EP...]",
            help="Expert-parallel size; several for --replay. Default: all ranks, or the most "
            "that divide the experts.",
        ),
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="TRACE",
            help="Answer from a trace, without training: a run with tracking.trace, its RUN/trace, "
            "or a published trace (docs/simulation.md).",
        ),
    ] = None,
    factor: Annotated[
        str | None, typer.Option(metavar="F[,F...]", help="--replay: capacity factors, or none.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="G[,G...]", help="--replay: rank, sequence, global.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="P[,P...]", help="--replay: experts that share slots.")
    ] = None,
    placement: Annotated[
        str | None, typer.Option(metavar="P[,P]", help="--replay: fixed, periodic.")
    ] = None,
    copies: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="--replay: slots per rank for copies."),
    ] = None,
    bias: Annotated[
        str | None,
        typer.Option(
            metavar="B[,B...]",
            help="--replay: select again with moe.balance.bias; needs tracking.trace=scores.",
        ),
    ] = None,
    routing_only: Annotated[
        bool, typer.Option("--routing-only", help="Route tokens of random numbers, train nothing.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(metavar="FORMAT:DIR", help="--replay: write it as flame:DIR or megatron:DIR."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="--replay: write the plot, one HTML file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the table as JSON on stdout.")
    ] = False,
    trust_code: TrustCode = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the table.")] = False,
) -> None:
    """Train in one process with the routing and the drops of many ranks, or replay a trace.

    Writes RUN/simulation.jsonl: rows between the ranks, load and straggler factor of each step and
    layer. With --replay nothing is trained, and other ranks, EP and capacities are compared.

    Example: dmoe simulate configs/quickstart.yaml train.steps=20 --ranks 8 --ep 8

    Example: dmoe simulate --replay runs/latest --ep 2,4,8 --factor 1,1.25,none --placement periodic
    """
    if replay is not None:
        _replay(
            arguments or [], replay, ranks, ep,
            factor, group, pool, placement, copies, bias, export, plot, as_json, trust_code,
        )  # fmt: skip
        return
    capacity = {"capacity.factor": factor, "capacity.group": group, "capacity.pool": pool}
    moe = {f"moe.{name}": value for name, value in {**capacity, "balance.bias": bias}.items()}
    moves = {"parallel.placement.kind": placement, "parallel.placement.copies": copies}
    for field, value in (moe | moves).items():
        if value is not None:
            name = field.rpartition(".")[2].replace("kind", "placement")
            fix = f"give {field}={value}, or --replay TRACE"
            raise ConfigError(f"--{name}", value, "belongs to --replay", fix)
    config, text = load_arguments(arguments or [])
    (world,) = _integers("--ranks", ranks or "8", one=True)
    sizes = [n for n in range(1, world + 1) if world % n == 0 and config.moe.num_experts % n == 0]
    (ep_size,) = _integers("--ep", ep, one=True) if ep else (max(sizes),)
    check(replace(config, parallel=replace(config.parallel, ep=ep_size)), world)
    launcher = read_launch_env()
    if launcher is not None and launcher.world_size > 1:
        allowed = "is that of a launcher, and one process simulates all ranks"
        raise ConfigError("WORLD_SIZE", launcher.world_size, allowed, "start it without one")

    from dmoe.simulation import simulate
    from dmoe.simulation.trace import open_trace

    notes: dict[str, Any] = {}
    if routing_only:
        folder = Path(config.train.run_dir or "runs/simulation")
        notes = simulate.route_only(config, folder, world, ep_size)
    else:
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            folder = simulate.simulate(config, text, world, ep_size, quiet or as_json)
    rows = _rows(open_trace(folder), [simulate.setting_of(config, world, ep_size)], config)
    _show(rows, folder, as_json, notes)
    if not routing_only:
        from dmoe.report import write_report

        write_report([folder], folder / "report.html")


def _replay(
    arguments: list[str],
    path: str,
    ranks: str | None,
    ep: str | None,
    factor: str | None,
    group: str | None,
    pool: str | None,
    placement: str | None,
    copies: str | None,
    bias: str | None,
    export: str | None,
    plot: Path | None,
    as_json: bool,
    trust_code: bool,
) -> None:
    """Compare settings on a trace; the options are lists with commas."""
    from dmoe.simulation.formats import export_trace, open_any

    config = load_with_run(arguments, path, trust_code)
    trace = open_any(Path(path), config)
    if export is not None:
        print(f"{export_trace(trace, export, config)}: written")
        return
    lists = {
        "factor": _values("--factor", factor, config.moe.capacity.factor, read_factor),
        "group": _values("--group", group, config.moe.capacity.group, str),
        "pool": _values("--pool", pool, config.moe.capacity.pool, _integer),
        "placement": _values("--placement", placement, config.parallel.placement.kind, str),
        "copies": _values("--copies", copies, config.parallel.placement.copies, _integer),
        "bias": _values("--bias", bias, None, lambda text: float(decimal(text, NUMBER))),
    }
    worlds = _integers("--ranks", ranks or str(_world(Path(path)) * config.parallel.virtual_ranks))
    eps = _integers("--ep", ep) if ep else None
    settings = _settings(config, trace.spec.global_batch, worlds, eps, lists)
    rows = _rows(trace, settings, config)
    if plot is not None:
        from dmoe.simulation.plot import write_plot

        write_plot(plot, rows, settings, trace)
    _show(rows, plot, as_json, {})


def _world(run: Path) -> int:
    """Return the number of processes of a run; 1 for what is no run directory."""
    if not (run / "metrics.jsonl").is_file():
        return 1
    lines = read_metrics(run / "metrics.jsonl", layers=False)
    return int(next((line["world"] for line in lines if line["event"] == "start"), 1))


def _settings(
    config: Config,
    batch: int,
    worlds: list[int],
    eps: list[int] | None,
    lists: dict[str, list[Any]],
) -> list[Setting]:
    """Return one setting per combination; a factor of none once, whatever its group and pool."""
    from dmoe.simulation.replay import Setting
    from dmoe.simulation.trace import first_placement

    settings: list[Setting] = []
    moe, given = config.moe, config.parallel.placement
    for world in worlds:
        fits = [n for n in range(1, world + 1) if world % n == 0 and moe.num_experts % n == 0]
        for ep in eps or [max(fits)]:
            for factor, group, pool, placement, copies, bias in itertools.product(*lists.values()):
                if factor is None and (group, pool) != (lists["group"][0], lists["pool"][0]):
                    continue
                capacity = replace(moe.capacity, factor=factor, group=group, pool=pool)
                if factor is None:
                    capacity = replace(capacity, pool=1, pool_floor=1.0)
                balance = moe.balance if bias is None else replace(moe.balance, bias=bias)
                for section, name in ((capacity, "capacity"), (balance, "balance")):
                    check_bounds(section, f"moe.{name}.")
                check_layer(replace(moe, capacity=capacity, balance=balance))
                moves = replace(given, kind=placement, copies=copies)
                if given.kind == "fixed" and placement == "periodic":
                    moves = replace(moves, every=1, from_="last")
                check_bounds(moves, "parallel.placement.")
                micro = min(config.train.micro_batch or batch, max(1, batch // world))
                owned = first_placement(config, ep)
                settings.append(Setting(world, ep, micro, capacity, moves, owned, bias))
    return settings


def _rows(trace: Trace, settings: list[Setting], config: Config) -> list[dict[str, Any]]:
    import torch

    from dmoe.simulation.replay import summarize
    from dmoe.simulation.selection import reselected, with_next_choices
    from dmoe.train.engine import resolve_precision

    precision = resolve_precision(config.train.precision, torch.device("cpu"), config.model.dim)
    size = BYTES_PER_NUMBER[precision]
    traces: dict[float | None, Trace] = {None: with_next_choices(trace, config)}
    for bias in {each.bias for each in settings if each.bias is not None}:
        moe = replace(config.moe, balance=replace(config.moe.balance, bias=bias))
        traces[bias] = reselected(trace, replace(config, moe=moe))
    return [summarize(traces[setting.bias], setting, config, size) for setting in settings]


def _show(
    rows: list[dict[str, Any]], path: Path | None, as_json: bool, notes: dict[str, Any]
) -> None:
    from dmoe.simulation.replay import table

    if as_json:
        print(json.dumps({"rows": rows, **notes}, indent=2))
        return
    width = min(140, shutil.get_terminal_size((100, 24)).columns)
    print("\n".join(text_table(*table(rows), width)))
    if notes:
        peak = format_bytes(notes["peak_bytes"])
        print(f"routed in {format_duration(notes['seconds'])}, with {peak} at most")
    if path is not None:
        print(os.fspath(path))


def _values(option: str, text: str | None, default: Any, parse: Callable[[str], Any]) -> list[Any]:
    allowed = {"--group": ("rank", "sequence", "global"), "--placement": ("fixed", "periodic")}
    if text is None:
        return [default]
    values = [parse(part.strip()) for part in text.split(",")]
    wrong = [value for value in values if option in allowed and value not in allowed[option]]
    if wrong:
        names = ", ".join(allowed[option])
        raise ConfigError(option, wrong[0], f"must be of {names}", f"use {allowed[option][0]}")
    return values


def _integer(text: str) -> int:
    return int(decimal(text, INTEGER))


def _integers(option: str, text: str, one: bool = False) -> list[int]:
    values = [int(decimal(part.strip(), INTEGER)) for part in text.split(",")]
    if min(values) < 1 or (one and len(values) > 1):
        allowed = "must be a number of ranks, 1 or more"
        fix = "use --ranks 8" if one else "separate several by commas"
        raise ConfigError(option, text, allowed, fix)
    return values
