"""`dmoe explain`"""

from __future__ import annotations

import itertools
import json
import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import ARGUMENTS_HELP, load_arguments
from dmoe.config.fields import list_fields
from dmoe.config.rules import check
from dmoe.config.schema import Config

if TYPE_CHECKING:
    from dmoe.explain import Section


WIDEST = 100


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(
            help="Explain the run on this many ranks. Default: parallel.ep, or 1 where that is auto.",
            min=1,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
    fields: Annotated[
        bool,
        typer.Option("--fields", help="List every config field with type, default and meaning."),
    ] = False,
) -> None:
    """Say in words and numbers what a config means: who owns which expert, capacity, bytes, parameters, schedule.

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
    ranks, why = world_of(config, world)
    check(config, ranks)

    from dmoe.explain import explain

    sections = explain(config, ranks)
    if as_json:
        content = {
            section.key: {"words": section.words, "numbers": section.numbers}
            for section in sections
        }
        print(json.dumps({"world": ranks, "world_from": why, **content}, indent=2))
    else:
        print(as_text(ranks, why, sections))


def world_of(config: Config, given: int | None) -> tuple[int, str]:
    """The world to explain, and where the number is from."""
    if given is not None:
        return given, "--world"
    if isinstance(config.parallel.ep, int) and config.parallel.ep > 0:
        return config.parallel.ep, "parallel.ep"
    return 1, "default"


def as_text(ranks: int, why: str, sections: list[Section]) -> str:
    hint = (
        ""
        if why == "--world"
        else f" (from {why}; --world N explains another)"
        if why != "default"
        else " (--world N for more)"
    )
    lines = [f"On {ranks} rank{'s' * (ranks > 1)}{hint}:"]
    for section in sections:
        lines += ["", section.title, *(_wrap(sentence, "  ", "  - ") for sentence in section.words)]
    return "\n".join(lines)


def fields_as_text() -> str:
    """Grouped by section; `name: type = default`, the meaning below."""
    lines: list[str] = []
    for section, items in itertools.groupby(list_fields(), key=lambda item: item.section):
        lines += ["", section, "-" * len(section)]
        for item in items:
            lines += [f"{item.name}: {item.type} = {item.default}", _wrap(item.doc, "    ")]
    return "\n".join(lines[1:])


def _wrap(text: str, indent: str, first: str | None = None) -> str:
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    start = indent if first is None else first
    return textwrap.fill(
        text,
        max(40, width),
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )
