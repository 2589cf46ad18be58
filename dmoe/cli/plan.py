"""Command `dmoe plan`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmoe.cli.common import (
    ARGUMENTS_HELP,
    TrustCode,
    integer,
    load_with_run,
    number,
    read_factor,
)
from dmoe.cli.surroundings import large_imports
from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import WORKLOADS
from dmoe.config.schema import Config, RouterConfig

if TYPE_CHECKING:
    from dmoe.simulation.trace import Trace

MAX_LOCAL_RANKS = 64
"""Of `--calibrate`, as of `dmoe doctor --ranks`."""


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(
            help="A cluster file, or one of a100x8, h100x8, h200x8, b200x8, gb200_nvl72, laptop."
        ),
    ] = "h100x8",
    ranks: Annotated[
        str | None, typer.Option(help="Numbers of ranks, e.g. 16,64. Default: one node.")
    ] = None,
    ep: Annotated[
        str | None, typer.Option(help="EP sizes to try, e.g. 1,8. Default: those that differ most.")
    ] = None,
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Imbalance: standard deviation of the logarithm of the experts' loads. 0: equal.",
            **number(least=0, most=10),
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Imbalance: a run with tracking.trace, its RUN/trace, or a published trace.",
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            metavar="W0..W7",
            help="Imbalance: a workload, for the largest EP that is tried; with "
            "moe.router.kind=workload for moe.router.ranks and moe.router.hot.",
        ),
    ] = None,
    factor: Annotated[
        str | None,
        typer.Option(
            metavar="F[,F...]",
            help="Capacity factors, or none, to compare at the best layout; each is another model.",
        ),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Default: that of the tokenizer.", **integer(2))
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(help="Tokens to train on, for days and price.", **number(above=0)),
    ] = None,
    hourly_cost: Annotated[
        float | None,
        typer.Option(
            "--price", help="Price of a rank for an hour; needs --tokens.", **number(least=0)
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure the CPUs of this machine in about a minute, for --ranks (default: 1, 2 "
            "and 4), and print a cluster file.",
        ),
    ] = False,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --calibrate: write it there.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON on stdout.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Plan a training on a cluster: memory, time, price, and the layout to use.

    Needs neither the ranks nor a GPU: one step of the real model, dispatchers and optimizer is run
    on tensors without memory.

    Example: dmoe plan configs/mixtral_8x7b.yaml --cluster h100x8 --ranks 16,64

    Example: dmoe plan --trace runs/latest --ranks 8 --factor 1,1.25

    Example: dmoe plan --calibrate --to laptop.yaml; dmoe plan --cluster laptop.yaml --ranks 2
    """
    if calibrate or to is not None:
        unread = {
            **{"--ep": ep, "--sigma": sigma, "--trace": trace, "--workload": workload},
            **{"--factor": factor, "--vocabulary": vocabulary, "--tokens": tokens},
            **{"--price": hourly_cost, "--json": as_json or None},
        }
        write_calibration(calibrate, arguments or [], unread, _integers("--ranks", ranks), to)
        return
    if hourly_cost is not None and tokens is None:
        allowed = "is the price of an hour, and a training has as many as its tokens need"
        raise ConfigError("--price", hourly_cost, allowed, "add --tokens 300e9")
    config = load_with_run(arguments or [], trace, trust_code)
    worlds = _integers("--ranks", ranks)
    sizes = _integers("--ep", ep)

    with large_imports():
        from dmoe.simulation.plan_page import numbers, page

    choices = imbalance(config, sigma, trace, workload)
    capacities = factors_of(factor, choices is not None or bool(sigma))
    answers = []
    lines: list[str] = []
    options = (sigma or 0.0, vocabulary, choices, capacities)
    for plan, precision in plans(config, cluster, worlds, sizes, *options):
        answers.append(numbers(plan, precision, tokens, hourly_cost))
        lines += [*([""] if lines else []), *page(plan, precision, tokens, hourly_cost)]
    print(json.dumps(answers, indent=2) if as_json else "\n".join(lines))


def plans(
    config: Config,
    cluster_name: str,
    worlds: list[int],
    ep_sizes: list[int],
    sigma: float,
    vocabulary: int | None,
    choices: Trace | RouterConfig | None,
    factors: list[float | None],
) -> Any:
    """Yield the plan for each number of ranks, and the precision."""
    from dmoe.simulation.cluster import load_cluster
    from dmoe.simulation.planner import make_plan

    cluster = load_cluster(cluster_name)
    for world in worlds or [cluster.devices]:
        yield make_plan(
            config, world, cluster, sigma, vocabulary, ep_sizes or None, choices, factors
        )


def imbalance(
    config: Config, sigma: float | None, trace: str | None, workload: str | None
) -> Trace | RouterConfig | None:
    """Return the choices that the ranks' loads come from; None: assumed, by `sigma`.

    Raises:
        ConfigError: more than one of the three, no such workload, no trace of the model.
    """
    given = {"--sigma": sigma, "--trace": trace, "--workload": workload}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        allowed = f"says the imbalance, and {names[0]} does too"
        raise ConfigError(names[1], given[names[1]], allowed, "give one of them")
    if workload is not None:
        if workload not in WORKLOADS:
            allowed = f"must be one of {', '.join(WORKLOADS)}"
            raise ConfigError("--workload", workload, allowed, "use W2, a hot rank")
        named: Any = workload
        return replace(config.moe.router, kind="workload", workload=named)
    if trace is None:
        return None
    from dmoe.simulation.formats import open_any

    try:
        return open_any(Path(trace), config, any_batch=True)
    except ConfigError as error:
        raise error.renamed({"--replay": "--trace"}) from None


def factors_of(text: str | None, is_uneven: bool) -> list[float | None]:
    """Read the capacity factors. Raises ConfigError: no numbers, or a load that drops nothing."""
    if text is None:
        return []
    if not is_uneven:
        allowed = "compares what is dropped, and a balanced load drops nothing"
        fix = "say the imbalance: --trace RUN, --workload W2 or --sigma 0.3"
        raise ConfigError("--factor", text, allowed, fix)
    return [read_factor(part.strip()) for part in text.split(",")]


def write_calibration(
    calibrate: bool,
    arguments: list[str],
    unread: dict[str, Any],
    worlds: list[int],
    to: str | None,
) -> None:
    """Measure this machine, and write or print a cluster file. Raises ConfigError."""
    if not calibrate:
        raise ConfigError("--to", to, "is where --calibrate writes", "add --calibrate")
    if arguments:
        allowed = "is not read by --calibrate, which trains models of its own"
        raise ConfigError("CONFIG", arguments[0], allowed, "leave it out")
    for name, value in unread.items():
        if value is not None:
            raise ConfigError(name, value, "is not read by --calibrate", "leave it out")
    from dmoe.bench.measure import machine
    from dmoe.simulation.calibration.calibrate import Effort
    from dmoe.simulation.calibration.calibrate import calibrate as measure
    from dmoe.simulation.calibration.cluster_file import check_target, to_text, write

    if max(worlds, default=1) > MAX_LOCAL_RANKS:
        allowed = f"are started on this machine, at most {MAX_LOCAL_RANKS} at a time"
        raise ConfigError("--ranks", max(worlds), allowed, "use --ranks 1,2,4")
    if to is not None:
        check_target(Path(to))
    found = measure(worlds or [1, 2, 4], Effort(), lambda text: print(text, file=sys.stderr))
    if to is None:
        print(to_text(found, machine()), end="")
    else:
        write(found, Path(to), machine())


def _integers(name: str, text: str | None) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(name, text, "must be whole numbers above 0", f"write {name} 16,64")
    return [int(part) for part in parts]
