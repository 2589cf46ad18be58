"""YAML text -> plain values, or one sentence that says what is wrong with it. Only what a config needs of YAML is let through.

The text is first looked at event by event, which costs no memory and runs no constructor: no tags (`!!python/object/apply` asks
for a call), no aliases (ten lines of them unfold to gigabytes), no depth that ends in a RecursionError, no numbers of a thousand
digits, and no `${...}`: OmegaConf would put environment variables, secrets among them, into the files of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmoe.config.errors import ConfigError
from dmoe.config.secrets import redact

MAX_BYTES = 1 << 16
MAX_DEPTH = 16
"""Of mappings and lists in each other; a config needs four."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
LIST = ""
"""In the place of a list's key."""
ENDLESS = re.compile(r"[-+]?[0-9][0-9a-fA-FxX_:.]{300,}")
"""A number that Python takes quadratic time to read, or refuses to."""


def read_text(path: str | Path) -> str:
    """The text of a config file, read once: it may be a pipe. Raises: ConfigError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fix = "give the path of a YAML file, e.g. configs/quickstart.yaml"
        raise ConfigError("CONFIG", path, f"cannot be read ({reason})", fix) from None
    if len(content) > MAX_BYTES:
        raise ConfigError(
            "CONFIG",
            path,
            f"a config file has at most {MAX_BYTES} bytes",
            "give the YAML config, not the data",
        )
    return text


def parse(text: str, field: str, shown: object) -> Any:
    """What the YAML in `text` says; None for an empty one.

    field, shown: how an error names the text: `CONFIG` and the file, or a field and the value of its override.
    Raises: ConfigError. Cost: the text is parsed twice.
    """
    try:
        for place, event in _events(text):
            if reason := _refused(event):
                raise ConfigError(
                    field,
                    shown,
                    f"{reason}{_where(event.start_mark, text, place)}",
                    "write the value out",
                )
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        return plain["value"]  # type: ignore[call-overload, index]
    except yaml.MarkedYAMLError as error:
        problem = error.problem or "not valid YAML"
        raise ConfigError(
            field, shown, f"{problem}{_where(error.problem_mark, text)}", "correct or quote it"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeError) as error:
        raise ConfigError(
            field, shown, f"is not valid YAML ({_first_line(error)})", "correct or quote it"
        ) from None
    except ConfigError:
        raise
    except (
        ValueError
    ) as error:  # of the constructors of int and float: `0x_` looks like a number and is none
        raise ConfigError(
            field, shown, f"holds a value that cannot be read ({_first_line(error)})", "correct it"
        ) from None


def quoted(text: str) -> str | None:
    """The text inside the quotes, if `text` is one quoted YAML scalar and nothing else."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        found = [
            event for event in yaml.parse(text, Loader=LOADER) if isinstance(event, yaml.NodeEvent)
        ]
    except (yaml.YAMLError, UnicodeError):
        return None
    return found[0].value if len(found) == 1 and isinstance(found[0], yaml.ScalarEvent) else None


def refuse_interpolation(field: str, value: str) -> None:
    """Raises: ConfigError."""
    if "${" in value:
        raise ConfigError(
            field,
            short(value),
            "must not hold ${, which would be replaced by a value from elsewhere",
            "write it out",
        )


def short(value: object) -> str:
    """As a sentence can hold it: on one line, and not the whole of a long one."""
    text = redact(str(value))  # before it is cut: a piece of a secret is a secret
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 40 else f"{text[:37]}..."


def _events(text: str) -> Iterator[tuple[str, yaml.Event]]:
    """Each event that is a key or a value, with the dotted key it belongs to."""
    keys: list[
        str | None
    ] = []  # of each open mapping, outermost first: its key, None while one is awaited; of a list LIST
    for event in yaml.parse(text, Loader=LOADER):
        opens = isinstance(event, yaml.CollectionStartEvent)
        if isinstance(event, yaml.CollectionEndEvent):
            keys.pop()
        is_key = isinstance(event, yaml.NodeEvent) and bool(keys) and keys[-1] is None
        if is_key:
            keys[-1] = short(getattr(event, "value", "?"))
        if isinstance(event, yaml.NodeEvent):
            yield ".".join(key for key in keys if key not in (None, LIST)), event
        if is_key and opens:
            raise yaml.MarkedYAMLError(
                problem="a key must be a name", problem_mark=event.start_mark
            )
        if opens:
            keys.append(None if isinstance(event, yaml.MappingStartEvent) else LIST)
        elif keys and keys[-1] != LIST and not is_key:
            keys[-1] = None
        if len(keys) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep", problem_mark=event.start_mark
            )


def _refused(event: yaml.Event) -> str | None:
    if isinstance(event, yaml.AliasEvent):
        return "YAML aliases are not allowed (a few of them can fill the memory)"
    if getattr(event, "tag", None) is not None:
        return (
            f"YAML tags like {short(event.tag.replace('tag:yaml.org,2002:', '!!'))} are not allowed"
        )
    if isinstance(event, yaml.ScalarEvent):
        if "${" in event.value:
            return "${ is not allowed, which would be replaced by a value from elsewhere"
        if not event.style and ENDLESS.match(event.value):
            return f"a number of {len(event.value)} digits is not allowed"
    return None


def _where(mark: yaml.Mark | None, text: str, place: str = "") -> str:
    line = f" in line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
    return f"{line} ({place})" if place else line


def _first_line(error: Exception) -> str:
    return short(str(error).split("\n")[0].rstrip("."))
