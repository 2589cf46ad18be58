"""`section.field=value` from a command line -> a nested mapping of plain values.

The value of a text field is taken as it stands: through YAML, `data.source=0123` was 83, a glob with a star in front an alias,
and `train.sample_prompt=def f(x):` a mapping. Everything else is YAML.
"""

from __future__ import annotations

import re
from typing import Any

from dmoe.config.document import parse, quoted, refuse_interpolation, short
from dmoe.config.errors import ConfigError
from dmoe.config.given import TEXT, field_named

__all__ = ["parse_override"]

KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,15}")


def parse_override(override: str) -> dict[str, Any]:
    """Raises: ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise ConfigError("override", short(override), "must look like section.field=value", "e.g. moe.top_k=1")
    value: Any = _value(key, text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _value(key: str, text: str) -> Any:
    refuse_interpolation(key, text)
    field = field_named(key)
    if field is None or field.type not in TEXT:
        return parse(text, key, short(text))
    if text == "null" and field.type == "str | null":
        return None
    inner = quoted(text)
    return text if inner is None else inner
