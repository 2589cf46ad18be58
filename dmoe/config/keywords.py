"""Fields whose name is a word of Python: `moe.replay.from` is the attribute `from_`.

YAML files, overrides and messages have the name without the underscore, as people write it; Python
does not allow it for an attribute (PEP 8 proposes the underscore). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from keyword import iskeyword
from typing import Any


def attribute(name: str) -> str:
    """Return the attribute of a part of a field's name: `from` -> `from_`."""
    return f"{name}_" if iskeyword(name) else name


def shown(name: str) -> str:
    """Return an attribute as people write it, dotted or not: `moe.replay.from_` -> `....from`."""
    return name[:-1] if name.endswith("_") and iskeyword(name[:-1].rpartition(".")[2]) else name


def with_attributes(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return nested values with attributes as keys."""
    return _renamed(given, attribute)


def with_shown(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return nested values with the names that people write as keys."""
    return _renamed(values, shown)


def _renamed(values: Mapping[Any, Any], rename: Any) -> dict[Any, Any]:
    return {
        rename(key) if isinstance(key, str) else key: (
            _renamed(value, rename) if isinstance(value, Mapping) else value
        )
        for key, value in values.items()
    }
