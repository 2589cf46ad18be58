"""YAML file + `key=value` overrides -> a frozen `Config`, or one sentence that says what is wrong."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmoe.config.errors import ConfigError
from dmoe.config.fields import list_fields
from dmoe.config.schema import Config

__all__ = ["load", "to_yaml"]

MAX_BYTES = 1 << 20


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the file, then the dotlist overrides, e.g. `moe.top_k=1`; no torch, well under a second.

    Raises:
        ConfigError: an unknown key, a wrong type, NaN, a file that is not a plain mapping. Values that do not fit together are
            `config.check`'s business.
    """
    merged = _writable(OmegaConf.structured(Config))
    if path is not None:
        merged = _merge(merged, _read(Path(path)), str(path))
    for override in overrides:
        merged = _merge(merged, _parse(override), override)
    config = cast(Config, OmegaConf.to_object(merged))
    _refuse_nan(config, "")
    return config


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


def _read(path: Path) -> DictConfig:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                "CONFIG", path, f"a config file has at most {MAX_BYTES} bytes", "give the YAML config, not the data"
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            "CONFIG", path, f"cannot be read ({reason})", "give the path of a YAML file, e.g. configs/quickstart.yaml"
        ) from None
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(
                "CONFIG", path, "YAML aliases are not allowed (a few of them can fill the memory)", "write the values out"
            )
        content = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        where = (
            f" in line {error.problem_mark.line + 1}" if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else ""
        )
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise ConfigError("CONFIG", path, f"{problem}{where}", "correct the file") from None
    if not isinstance(content, DictConfig):
        raise ConfigError("CONFIG", path, "must be a mapping of sections", "see configs/quickstart.yaml")
    return content


def _parse(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ConfigError("override", override, "must look like section.field=value", "e.g. moe.top_k=1")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(key, override.partition("=")[2], f"is not a YAML value ({_first_line(error)})", "quote it") from None


def _merge(base: DictConfig, new: DictConfig, source: str) -> DictConfig:
    _refuse_wrong_sections(base, new, "")
    try:
        return cast(DictConfig, OmegaConf.merge(base, new))
    except OmegaConfBaseException as error:
        key = error.full_key or source
        value = OmegaConf.select(new, key, default="?") if error.full_key else "?"
        field = next((field for field in list_fields() if field.name == key), None)
        if field is None:
            raise ConfigError(
                key, value, _first_line(error), "see `dmoe explain --fields` for every field and its type"
            ) from None
        raise ConfigError(
            key, value, f"must be {field.type.replace(' | ', ' or ')}", f"the default is {field.default}"
        ) from None


def _refuse_wrong_sections(base: DictConfig, new: DictConfig, prefix: str) -> None:
    """Unknown keys with the nearest known one, and scalars where a section belongs; OmegaConf's own words name neither."""
    for key in map(str, new):
        path = f"{prefix}{key}"
        if key not in base:
            near = difflib.get_close_matches(key, [str(k) for k in base], n=1)
            known = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(str(k) for k in base)}"
            raise ConfigError(path, _short(new._get_node(key)), "there is no such field", known)
        section, given = base._get_node(key), new._get_node(key)
        if isinstance(section, DictConfig):
            if not isinstance(given, DictConfig):
                raise ConfigError(
                    path, _short(given), "is a section, not a value", f"set one of its fields: {', '.join(map(str, section))}"
                )
            _refuse_wrong_sections(section, given, f"{path}.")


def _refuse_nan(section: Any, prefix: str) -> None:
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            _refuse_nan(value, f"{prefix}{item.name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{item.name}", value, "must be a finite number", "give a number")


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def _short(node: Any) -> str:
    text = str(node)
    return text if len(text) <= 40 else text[:37] + "..."
