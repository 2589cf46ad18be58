"""Errors of files that cannot be read: one sentence with the file, and the line or row."""

from __future__ import annotations

import importlib
from types import ModuleType

from dmoe.config.errors import ConfigError


def unreadable(origin: str, path: object, reason: str, fix: str) -> ConfigError:
    """Return the error of a file.

    Args:
        origin: the config field that names the file, e.g. data.source.
        path: of the file.
        reason: what is wrong, with the line or row.
        fix: what to do.
    """
    return ConfigError(origin, path, reason, fix)


def optional_library(name: str, origin: str, path: object, what: str) -> ModuleType:
    """Import a library of the extra `data`, or raise a ConfigError that says how to get it.

    Args:
        name: of the module.
        origin: the config field that names the file.
        path: of the file.
        what: the format that needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise ConfigError(
            origin,
            path,
            f"is {what}, and reading it needs {library}, which is not installed",
            "pip install 'dmoe[data]'",
        ) from error
