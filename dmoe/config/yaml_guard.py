"""Parse YAML text into plain values, with only what a config needs of YAML.

Refused before any value is constructed: tags (`!!python/object/apply` calls a function), aliases
(ten lines of them expand to gigabytes), deep nesting (RecursionError), numbers of hundreds of
digits, empty values (an unset variable of a shell or a template), and `${...}`: OmegaConf would
write environment variables into the files of the run.

Only decimal numbers are numbers. YAML 1.1 would read 010 as 8, 1_000 as 1000, 1:30 as 90 and 0x10
as 16: here they are the text that was written, which a field for numbers refuses.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dmoe.config.errors import ConfigError
from dmoe.config.secrets import redact

MAX_BYTES = 1 << 16
MAX_DEPTH = 16
"""Nesting of mappings and lists; a config needs four."""
LONG_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxX_:.]{300,}")
"""A number that Python parses in quadratic time, or refuses."""
INTEGER = r"-?(?:0|[1-9][0-9]*)"
NUMBER = rf"(?:{INTEGER}(?:\.[0-9]*)?|-?\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
"""Decimal numbers, in YAML and in quoted text. No sign +, no leading zeros, no separators."""
NOT_FINITE = r"[-+]?\.?(?:inf|Inf|INF)|\.?(?:nan|NaN|NAN)"
"""Read as numbers too, so that the error can say that they are not finite."""
NULLS = ("null", "Null", "NULL", "~")


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Loads YAML and refuses the first dangerous node, with its line and dotted key."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def __init__(self, text: str, field: str, shown: object) -> None:
        """Start to read `text`; `field` and `shown` are what an error names."""
        super().__init__(text)
        self.text, self.field, self.shown = text, field, shown
        self.path: list[str] = []
        """Keys of the node and of those around it; empty for a list item, a key, the document."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Check the next event, then compose its node.

        Args:
            parent: the list or mapping around it, or None.
            index: the node of its key, or its position in a list; None for a key or the document.
        """
        event = self.peek_event()
        self.path.append(short(index.value) if isinstance(index, yaml.ScalarNode) else "")
        if reason := _forbidden(event):
            where = _where(event.start_mark, self.text, ".".join(filter(None, self.path)))
            fix = "write a value, or null for none" if reason == EMPTY else "write the value out"
            raise ConfigError(self.field, self.shown, f"{reason}{where}", fix)
        if isinstance(event, yaml.CollectionStartEvent):
            problem = "a key must be a name"
            if len(self.path) > MAX_DEPTH:
                problem = f"nested more than {MAX_DEPTH} deep"
            if len(self.path) > MAX_DEPTH or (parent and index is None):
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.path.pop()
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice: YAML takes the last."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"found duplicate key {short(key.value)}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.tag == "tag:yaml.org,2002:null":
                problem = "not valid YAML here: a key must be a name"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


for tag, pattern, first in (
    (
        "bool",
        "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
        "yYnNtTfFoO",
    ),
    ("null", "|".join(map(re.escape, NULLS)), "nN~"),
    ("int", INTEGER, "-0123456789"),
    ("float", f"{NUMBER}|{NOT_FINITE}", "-+.0123456789iInN"),
):
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first)
    )


def read_text(path: str | Path) -> str:
    """Read a config file, once: it may be a pipe.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is longer than `MAX_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fix = "give the path of a YAML file, e.g. configs/quickstart.yaml"
        raise ConfigError("CONFIG", path, f"cannot be read ({reason})", fix) from None
    if len(content) > MAX_BYTES:
        allowed = f"a config file has at most {MAX_BYTES} bytes"
        raise ConfigError("CONFIG", path, allowed, "give the YAML config, not the data")
    return text


def parse(text: str, field: str, shown: object) -> Any:
    """Parse YAML into plain values; None for an empty text.

    Args:
        text: the YAML.
        field: what an error names: `CONFIG`, or the field of an override.
        shown: its value in the error: the file, or the value of the override.

    Raises:
        ConfigError: not YAML, or YAML that a config must not use.
    """
    try:
        return StrictLoader(text, field, shown).get_single_data()
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        allowed = (error.problem or "not valid YAML") + _where(error.problem_mark, text)
    except (yaml.YAMLError, UnicodeError) as error:
        allowed = f"is not valid YAML ({_first_line(error)})"
    raise ConfigError(field, shown, allowed, "correct or quote it")


def quoted(text: str) -> str | None:
    """Return the text inside the quotes if `text` is one quoted YAML scalar, else None."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        node = StrictLoader(text, "", "").get_single_node()
    except (yaml.YAMLError, UnicodeError, ConfigError):
        return None
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None


def check_text(field: str, value: str) -> None:
    """Refuse `${` in a text, a NUL, and a text that cannot be written as UTF-8.

    Raises:
        ConfigError: it is one of them.
    """
    if shown := not_utf8(value):
        raise ConfigError(field, short(shown), "is not UTF-8 text", "type it again, or rename it")
    if "\0" in value:
        raise ConfigError(field, short(value), NUL, "write it without")
    if "${" in value:
        allowed = "must not hold ${, which would be replaced by a value from elsewhere"
        raise ConfigError(field, short(value), allowed, "write it out")


def short(value: object) -> str:
    """Format a value for an error: on one line, without secrets, at most 40 characters."""
    # Redacted before it is cut: a part of a secret would not be recognized.
    text = redact(str(value))
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 40 else f"{text[:37]}..."


def not_utf8(text: str) -> str | None:
    r"""Return `text` in readable form (`caf\xe9`) if it is not UTF-8, else None.

    Python reads other bytes of the command line, the environment and file names as lone surrogates,
    which YAML's `"\udce9"` is too; no file and no library takes them as text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        try:
            content = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            content = text.encode("utf-8", "backslashreplace")
        return content.decode("utf-8", "backslashreplace")
    return None


EMPTY = "an empty value is not allowed"
NUL = "a NUL character is not allowed"
"""No path can hold one."""


def _forbidden(event: yaml.Event) -> str | None:
    """Return why a config must not have this event, or None."""
    if isinstance(event, yaml.AliasEvent):
        return "YAML aliases are not allowed (a few of them can fill the memory)"
    if getattr(event, "tag", None) is not None:
        tag = short(event.tag.replace("tag:yaml.org,2002:", "!!"))
        return f"YAML tags like {tag} are not allowed"
    if isinstance(event, yaml.ScalarEvent):
        if shown := not_utf8(event.value):
            return f"{short(shown)} is not UTF-8 text"
        if "\0" in event.value:
            return NUL
        if "${" in event.value:
            return "${ is not allowed, which would be replaced by a value from elsewhere"
        if not event.style and not event.value:
            return EMPTY
        if not event.style and LONG_NUMBER.match(event.value):
            return f"a number of {len(event.value)} digits is not allowed"
    return None


def _where(mark: yaml.Mark | None, text: str, keys: str = "") -> str:
    line = f" in line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
    return f"{line} ({keys})" if keys else line


def _first_line(error: Exception) -> str:
    return short(str(error).split("\n")[0].rstrip("."))
