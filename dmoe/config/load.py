"""Load a YAML file and `section.field=value` overrides into a frozen `Config`.

The value of a text field in an override is taken literally: as YAML, `data.source=0123` would be
83, a glob that begins with a star an alias, and `train.sample_prompt=def f(x):` a mapping. All
other values are YAML with decimal numbers only (`yaml_guard.py`); one word for a list of words is a
list of one. No value may be empty: that is a
shell's variable that is not set, and as YAML it would be null, which switches some fields off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmoe.config.errors import ConfigError
from dmoe.config.field_aliases import BOOLEAN_WORDS
from dmoe.config.fields import TEXT, check_given, field_named, list_fields
from dmoe.config.keywords import shown, with_attributes, with_shown
from dmoe.config.plugins import FORM, anchored
from dmoe.config.published import with_source
from dmoe.config.schema import Config
from dmoe.config.yaml_guard import NULLS, check_text, parse, quoted, read_text, short

KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,15}")


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load the defaults, then the file, then the overrides, e.g. `moe.top_k=1`. Imports no torch.

    `dmoe.config.rules.check` checks that the values fit together.

    Raises:
        ConfigError: an unknown key, a wrong type, NaN, a file that is not a plain mapping.
    """
    return load_text("" if path is None else read_text(path), str(path), overrides)


def load_text(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """Load from the text of a file; `source` is its name in errors."""
    merged = deepcopy(_defaults())
    given = _mapping(text, source)
    if Path(source).is_file():
        given = anchored(given, Path(source).parent.absolute())
    _merge(merged, given, source)
    if isinstance(overrides, str):
        raise ConfigError("overrides", overrides, "must be a list of texts", f"use [{overrides!r}]")
    parts = [given]
    for override in overrides:
        parts.append(parse_override(override))
        _merge(merged, parts[-1])
    set_names = {name for part in parts for name in _names(part)}
    return with_source(cast(Config, OmegaConf.to_object(merged)), set_names)


def _names(given: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields in a nested mapping."""
    for key, value in given.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def to_yaml(config: Config) -> str:
    """Format the whole config, defaults included, as YAML that `load` reads back."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    return OmegaConf.to_yaml(OmegaConf.create(with_shown(cast(dict[Any, Any], values))))


@cache
def _defaults() -> DictConfig:
    """The schema with its defaults: built in 38 ms, copied in 5."""
    return _writable(OmegaConf.structured(Config))


def _writable(config: DictConfig) -> DictConfig:
    """Clear the read-only flags that frozen dataclasses set; only the result has to be frozen."""
    OmegaConf.set_readonly(config, False)
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig):
            _writable(node)
    return config


def _mapping(text: str, source: str) -> dict[Any, Any]:
    content = parse(text, "CONFIG", source)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            "CONFIG", source, "must be a mapping of sections", "see configs/quickstart.yaml"
        )
    return content


def _merge(base: DictConfig, given: dict[Any, Any], source: str = "") -> None:
    """Merge into `base` in place: `OmegaConf.merge` would copy the whole config."""
    given = _with_lists(given)
    check_given(given, source)
    try:
        base.merge_with(with_attributes(given))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        # of a mapping's value, e.g. optim.groups, OmegaConf names the value's own key
        key = shown(key)
        field = next((f for f in list_fields() if f"{key}.".startswith(f"{f.name}.")), None)
        if field is None:
            raise
        value = short(OmegaConf.select(OmegaConf.create(given), field.name))
        where = f" (in {source})" if source else ""
        allowed = f"must be {field.type.replace(' | ', ' or ')}{where}"
        raise ConfigError(field.name, value, allowed, f"the default is {field.default}") from None


def _with_lists(given: dict[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """Return `given` with lists of one for words where the schema has lists, and new spellings."""
    result = dict[Any, Any]()
    for key, value in given.items():
        field = field_named(f"{prefix}{key}")
        if isinstance(value, dict):
            value = _with_lists(value, f"{prefix}{key}.")
        elif field is not None and field.type == "list[str]" and isinstance(value, str):
            value = [value]
        elif field is not None and isinstance(value, bool):
            value = BOOLEAN_WORDS.get(field.name, {}).get(value, value)
        result[key] = value
    return result


def parse_override(override: str) -> dict[str, Any]:
    """Turn `section.field=value` into a nested mapping.

    Raises:
        ConfigError: not of that form, or a value that is not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise ConfigError(
            "override", short(override), "must look like section.field=value", "e.g. moe.top_k=1"
        )
    value: Any = _value(key, text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _value(key: str, text: str) -> Any:
    check_text(key, text)
    field = field_named(key)
    is_text = field is not None and (field.type in TEXT or field.type.endswith(FORM))
    if not text:
        fix = "write a value; is a variable of the shell not set?"
        fix = f"{fix} An empty text is \"''\"" if field and field.type in TEXT else fix
        raise ConfigError(key, "''", "must not be empty", fix)
    if field is None or not is_text:
        value = parse(text, key, short(text))
        if value is None and text.strip() not in NULLS:
            raise ConfigError(key, short(text), "holds no value", "write one, or null for none")
        return value
    if text == "null" and field.type == "str | null":
        return None
    inner = quoted(text)
    return text if inner is None else inner
