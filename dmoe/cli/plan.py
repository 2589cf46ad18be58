"""Command `dmoe plan`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dmoe.cli.common import ARGUMENTS_HELP, integer, load_arguments, number
from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(help="A cluster file, or one of a100x8, h100x8, h200x8, b200x8, gb200_nvl72."),
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
            **number(),
        ),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Default: that of the tokenizer.", **integer(2))
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens to train on, for days and price.", **number())
    ] = None,
    hourly_cost: Annotated[
        float | None, typer.Option("--price", help="Price of a rank for an hour.", **number())
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON on stdout.")
    ] = False,
) -> None:
    """Plan a training on a cluster: memory, time, price, and the layout to use.

    Needs neither the ranks nor a GPU: one step of the real model, dispatchers and optimizer is run
    on tensors without memory.

    Example: dmoe plan configs/mixtral_8x7b.yaml --cluster h100x8 --ranks 16,64
    """
    config, _ = load_arguments(arguments or [])
    worlds = _integers("--ranks", ranks)
    sizes = _integers("--ep", ep)

    from dmoe.simulation.plan_page import numbers, page

    answers = []
    lines: list[str] = []
    for plan, precision in plans(config, cluster, worlds, sizes, sigma or 0.0, vocabulary):
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
) -> Any:
    """Yield the plan for each number of ranks, and the precision."""
    from dmoe.simulation.cluster import load_cluster
    from dmoe.simulation.planner import make_plan

    cluster = load_cluster(cluster_name)
    for world in worlds or [cluster.devices]:
        yield make_plan(config, world, cluster, sigma, vocabulary, ep_sizes or None)


def _integers(name: str, text: str | None) -> list[int]:
    parts = [] if text is None else text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(name, text, "must be whole numbers above 0", f"write {name} 16,64")
    return [int(part) for part in parts]
