"""Command `dmoe explain`."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import ARGUMENTS_HELP, integer, load_arguments
from dmoe.config.fields import list_fields
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.report.format import format_bytes, plural

if TYPE_CHECKING:
    from dmoe.explain import Section

MAX_WIDTH = 100
MIN_WIDTH = 40


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(
            help="Explain the run on this many ranks. Default: parallel.ep, or 1 if that is auto.",
            **integer(1),
        ),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            help="Ranks of one machine: says which exchanges cross the network.", **integer(1)
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the same as JSON on stdout.")
    ] = False,
    fields: Annotated[
        bool,
        typer.Option("--fields", help="List every config field with type, default and meaning."),
    ] = False,
) -> None:
    """Explain a config: expert placement, capacity, bytes, parameters, schedule.

    Needs neither the ranks nor a GPU, and allocates no weights.

    Example: dmoe explain configs/quickstart.yaml --world 2 moe.capacity.factor=1.25
    """
    if fields:
        print(
            json.dumps([asdict(item) for item in list_fields()], indent=2)
            if as_json
            else fields_as_text()
        )
        return
    config, _ = load_arguments(arguments or [])
    world, origin = choose_world(config, world)
    check(config, world)

    from dmoe.explain import explain

    sections = explain(config, world, ranks_per_node)
    size = next(section.numbers for section in sections if section.key == "size")
    sections.append(plan_section(config, arguments or [], world, size["rank_bytes"]["total"]))
    if as_json:
        content = {
            section.key: {"words": section.sentences, "numbers": section.numbers}
            for section in sections
        }
        print(json.dumps({"world": world, "world_from": origin, **content}, indent=2))
    else:
        print(as_text(world, origin, sections))


def choose_world(config: Config, given: int | None) -> tuple[int, str]:
    """Return the number of ranks to explain, and the setting it comes from."""
    if given is not None:
        return given, "--world"
    if isinstance(config.parallel.ep, int) and config.parallel.ep > 0:
        return config.parallel.ep, "parallel.ep"
    return 1, "default"


def plan_section(config: Config, arguments: list[str], world: int, size: int) -> Section:
    """Name the command that plans this run, and the cards that cannot hold `size` bytes a rank."""
    from dmoe.explain import Section
    from dmoe.simulation.cluster import load_cluster, shipped

    command = shlex.join(["dmoe", "plan", *arguments, "--ranks", str(world)])
    sentences = [f"Layouts that fit, their time and price: {command}"]
    clusters = [load_cluster(name) for name in shipped()]
    gpus = sorted((c for c in clusters if c.device == "cuda"), key=lambda c: c.memory)
    names = {c.name.partition(",")[0]: c.memory for c in gpus if config.train.device != "cpu"}
    small = [name for name, memory in names.items() if memory < size]
    if small:
        fitting = "; ".join(name for name in names if name not in small)
        least = (
            f"Cards that do: {fitting}." if fitting else "No card that dmoe plan knows holds it."
        )
        sentences.insert(
            0,
            f"No card of {' or '.join(small)} holds the {format_bytes(size)} per rank, to which "
            f"activations and buffers come. {least}",
        )
    numbers = {"command": command, "cards_too_small": small}
    return Section("plan", "Plan", sentences, numbers)


def as_text(world: int, origin: str, sections: list[Section]) -> str:
    """Render the sections, wrapped to the terminal; `origin` is the source of `world`."""
    hints = {"--world": "", "default": " (--world N for more)"}
    hint = hints.get(origin, f" (from {origin}; --world N explains another)")
    lines = [f"On {plural(world, 'rank')}{hint}:"]
    for section in sections:
        sentences = (_wrap(sentence, "  ", "  - ") for sentence in section.sentences)
        lines += ["", section.title, *sentences]
    return "\n".join(lines)


def fields_as_text() -> str:
    """Render all config fields by section: `name: type = default`, the meaning below."""
    lines: list[str] = []
    for section, items in itertools.groupby(list_fields(), key=lambda item: item.section):
        lines += ["", section, "-" * len(section)]
        for item in items:
            lines += [f"{item.name}: {item.type} = {item.default}", _wrap(item.doc, "    ")]
    return "\n".join(lines[1:])


def _wrap(text: str, indent: str, first_indent: str | None = None) -> str:
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
    start = indent if first_indent is None else first_indent
    return textwrap.fill(
        text,
        max(MIN_WIDTH, width),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )
