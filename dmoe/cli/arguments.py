"""What the commands share: `[CONFIG] [section.field=value ...]`."""

from __future__ import annotations

from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config

__all__ = ["ARGUMENTS_HELP", "load_arguments", "split"]

ARGUMENTS_HELP = "A YAML file (default: the quickstart), then overrides like moe.top_k=1."


def split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The config file, if the first argument is one, and the overrides."""
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(files) > 1 or (files and arguments[0] != files[0]):
        raise ConfigError(
            "argument", files[-1], "is neither the first argument (CONFIG) nor section.field=value", "put CONFIG first"
        )
    return (files[0] if files else None), overrides


def load_arguments(arguments: list[str]) -> tuple[Config, str]:
    """The config, and what the user gave as text: the file, and the overrides as comments."""
    path, overrides = split(arguments)
    config = load(path, overrides)
    text = Path(path).read_text(encoding="utf-8") if path else "# no file given: the defaults\n{}\n"
    return config, text + "".join(f"# override: {override}\n" for override in overrides)
