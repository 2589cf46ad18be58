"""Arguments that the commands share: `[CONFIG] [section.field=value ...]`."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from dmoe.config.errors import ConfigError
from dmoe.config.load import load, load_text
from dmoe.config.plugin_loader import load_plugins, refuse_code
from dmoe.config.schema import Config
from dmoe.config.shipped import find_config
from dmoe.config.yaml_guard import INTEGER, NUMBER, read_text, short
from dmoe.runs.directory import find_run

ARGUMENTS_HELP = (
    "A YAML file, or the name of a shipped one (see dmoe configs; default: the quickstart), then "
    "overrides like moe.top_k=1. Numbers are decimal, no value is empty (null for none)."
)
DEFAULTS = "# no file given: the defaults\n{}\n"


def split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Separate the path of the config file, if the first argument is one, from the overrides.

    The path of an existing file may contain `=`. A shipped config may be given by its name.
    """
    first = [
        argument for argument in arguments[:1] if "=" not in argument or os.path.isfile(argument)
    ]
    overrides = arguments[len(first) :]
    wrong = next((argument for argument in overrides if "=" not in argument), None)
    if wrong is not None:
        raise ConfigError(
            "argument",
            wrong,
            "is neither the first argument (CONFIG) nor section.field=value",
            "put CONFIG first",
        )
    return (find_config(first[0]) if first else None), overrides


def load_arguments(arguments: list[str]) -> tuple[Config, str]:
    """Return the config, and the user's input as text: the file, with overrides as comments."""
    path, overrides = split(arguments)
    text = DEFAULTS if path is None else read_text(path)
    # the user's own config: what it names may run
    config = _with_table_shape(load_plugins(load_text(text, str(path), overrides)))
    end = "" if not text or text.endswith("\n") else "\n"
    return config, text + end + "".join(
        f"# override: {_one_line(override)}\n" for override in overrides
    )


def _with_table_shape(config: Config) -> Config:
    """Return the config with columns and classes of its own table; numpy is read for that only."""
    if config.train.task != "classification":
        return config
    from dmoe.data.tables import fill_table_shape

    return fill_table_shape(config)


def load_resumed(run: str, overrides: list[str], *, trust_code: bool = False) -> tuple[Config, str]:
    """Return the config that a run recorded, with changes, and its text.

    Args:
        run: the run directory, e.g. `runs/latest`.
        overrides: what the user changes, e.g. `train.steps=800`.
        trust_code: load the code that the run names; what an override names is the user's own.
    """
    wrong = next((a for a in overrides if "=" not in a or a.startswith("train.run_dir=")), None)
    if wrong is not None:
        allowed = "does not go with --resume, which takes config and directory from the run"
        raise ConfigError("argument", wrong, allowed, "give overrides like train.steps=800 only")
    path = find_run(run).path
    if not trust_code:
        refuse_code(load(path / "resolved.yaml"), [a.partition("=")[0] for a in overrides])
    here = [*overrides, f"train.run_dir={path}"]
    return load_arguments([str(path / "resolved.yaml"), *here])


def load_with_run(arguments: list[str], run: str | None, trust_code: bool) -> Config:
    """Return the config of the arguments; without CONFIG, that of `run` if it is a run directory.

    Raises:
        ConfigError: as `load_arguments`; code that the run names, without `trust_code`.
    """
    given, names_config = list(arguments), bool(arguments) and "=" not in arguments[0]
    resolved = None if run is None else Path(run) / "resolved.yaml"
    if resolved is not None and resolved.is_file() and not names_config:
        if not trust_code:
            refuse_code(load(resolved), [argument.partition("=")[0] for argument in given])
        given = [str(resolved), *given]
    return load_arguments(given)[0]


def _one_line(override: str) -> str:
    """Quote an override with a line break, which would end the comment in the config."""
    return override if override.isprintable() else json.dumps(override)


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Run the code that RUN names (FILE.py:Name). Whoever wrote RUN chose it.",
    ),
]


def integer(least: int | None = None, most: int | None = None) -> dict[str, Any]:
    """Return arguments of `typer.Option` for an integer in decimal notation, from least to most.

    Python's `int` would read 010 as 10 and 1_0 too; a config file refuses both (`yaml_guard.py`).
    """

    def parse(value: Any) -> int:
        number = int(decimal(value, INTEGER))
        if (least is not None and number < least) or (most is not None and number > most):
            allowed = f"{least} or more" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{value} must be {allowed}")
        return number

    return {"parser": parse, "metavar": "INTEGER"}


def number(
    least: float | None = None, above: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """Return arguments of `typer.Option` for a finite number in decimal notation, in bounds."""

    def parse(value: Any) -> float:
        found = float(decimal(value, NUMBER))
        if not math.isfinite(found):
            raise typer.BadParameter(f"{short(str(value))} is larger than a number can be")
        if (least is not None and found < least) or (above is not None and found <= above):
            allowed = f"{least:g} or more" if least is not None else f"above {above:g}"
            raise typer.BadParameter(f"{value} must be {allowed}")
        if most is not None and found > most:
            raise typer.BadParameter(f"{value} must be at most {most:g}")
        return found

    return {"parser": parse, "metavar": "FLOAT"}


def read_factor(text: str) -> float | None:
    """Return a capacity factor of an option; None for `none`: dropless."""
    return None if text in ("none", "null") else float(decimal(text, NUMBER))


def decimal(value: Any, pattern: str) -> str:
    """Return the text of an option, or of its default, if it is a number in decimal notation."""
    text = str(value)
    if not re.fullmatch(pattern, text) or len(text) > 40:  # Python refuses to read 5000 digits
        raise typer.BadParameter(f"{short(text)} is no number in decimal notation")
    return text
