"""YAML file + `key=value` overrides -> a frozen `Config`, or one sentence that says what is wrong.

`section.field=value` from a command line -> a nested mapping of plain values.

The value of a text field is taken as it stands: through YAML, `data.source=0123` was 83, a glob with a star in front an alias,
and `train.sample_prompt=def f(x):` a mapping. Everything else is YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmoe.config.errors import ConfigError
from dmoe.config.fields import TEXT, field_named, refuse_wrong
from dmoe.config.schema import Config
from dmoe.config.yaml_guard import parse, quoted, read_text, refuse_interpolation, short


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the file, then the dotlist overrides, e.g. `moe.top_k=1`; no torch, well under a second.

    Raises:
        ConfigError: an unknown key, a wrong type, NaN, a file that is not a plain mapping. Values that do not fit together are
            `config.check`'s business.
    """
    return load_text("" if path is None else read_text(path), str(path), overrides)


def load_text(text: str, source: str, overrides: Sequence[str] = ()) -> Config:
    """`load` of a file that was read already; `source` is its name in errors."""
    merged = _writable(OmegaConf.structured(Config))
    merged = _merge(merged, _mapping(text, source), source)
    for override in overrides:
        merged = _merge(merged, parse_override(override))
    return cast(Config, OmegaConf.to_object(merged))


def to_yaml(config: Config) -> str:
    """The whole config, defaults included, as YAML that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _writable(config: DictConfig) -> DictConfig:
    """Frozen dataclasses make read-only nodes; only the result has to be frozen."""
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


def _merge(base: DictConfig, given: dict[Any, Any], source: str = "") -> DictConfig:
    refuse_wrong(given, source)
    try:
        return cast(DictConfig, OmegaConf.merge(base, OmegaConf.create(given)))
    except OmegaConfBaseException as error:
        field = field_named(error.full_key or "")
        if field is None:
            raise
        value = short(OmegaConf.select(OmegaConf.create(given), field.name))
        place = f" (in {source})" if source else ""
        raise ConfigError(
            field.name,
            value,
            f"must be {field.type.replace(' | ', ' or ')}{place}",
            f"the default is {field.default}",
        ) from None


KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,15}")


def parse_override(override: str) -> dict[str, Any]:
    """Raises: ConfigError."""
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
    refuse_interpolation(key, text)
    field = field_named(key)
    if field is None or field.type not in TEXT:
        return parse(text, key, short(text))
    if text == "null" and field.type == "str | null":
        return None
    inner = quoted(text)
    return text if inner is None else inner
