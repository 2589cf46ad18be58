"""What the commands share: `[CONFIG] [section.field=value ...]`."""

from __future__ import annotations

import json
import os

from dmoe.config.document import read_text
from dmoe.config.errors import ConfigError
from dmoe.config.load import load_text
from dmoe.config.schema import Config

__all__ = ["ARGUMENTS_HELP", "load_arguments", "split"]

ARGUMENTS_HELP = "A YAML file (default: the quickstart), then overrides like moe.top_k=1."
DEFAULTS = "# no file given: the defaults\n{}\n"


def split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The config file, if the first argument is one, and the overrides. A first argument that is a file's path may hold `=`."""
    first = [argument for argument in arguments[:1] if "=" not in argument or os.path.isfile(argument)]
    overrides = arguments[len(first) :]
    wrong = next((argument for argument in overrides if "=" not in argument), None)
    if wrong is not None:
        raise ConfigError(
            "argument", wrong, "is neither the first argument (CONFIG) nor section.field=value", "put CONFIG first"
        )
    return (first[0] if first else None), overrides


def load_arguments(arguments: list[str]) -> tuple[Config, str]:
    """The config, and what the user gave as text: the file, and the overrides as comments."""
    path, overrides = split(arguments)
    text = DEFAULTS if path is None else read_text(path)
    config = load_text(text, str(path), overrides)
    end = "" if not text or text.endswith("\n") else "\n"
    return config, text + end + "".join(f"# override: {_one_line(override)}\n" for override in overrides)


def _one_line(override: str) -> str:
    """A line break in a prompt would end the comment, and what follows would be read as config."""
    return override if override.isprintable() else json.dumps(override)
