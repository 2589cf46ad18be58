"""YAML file + `key=value` overrides -> a frozen `Config`, or one sentence that says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmoe.config.document import parse, read_text, short
from dmoe.config.errors import ConfigError
from dmoe.config.given import field_named, refuse_wrong
from dmoe.config.overrides import parse_override
from dmoe.config.schema import Config

__all__ = ["load", "load_text", "to_yaml"]


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
        raise ConfigError("CONFIG", source, "must be a mapping of sections", "see configs/quickstart.yaml")
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
            field.name, value, f"must be {field.type.replace(' | ', ' or ')}{place}", f"the default is {field.default}"
        ) from None
