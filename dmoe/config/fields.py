"""Every field of the schema with its type, default and docstring; checks of given values.

The table is read from the source of `schema/`, so that a description is written once, there.
Given values are checked before OmegaConf sees them: it turns the number 12 into the text "12" and
the text "0600" into the number 600, and its messages name neither the file nor the nearest field.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.field_aliases import suggest_field
from dmoe.config.keywords import shown
from dmoe.config.plugins import FORM, parse
from dmoe.config.secrets import REDACTED, is_secret_name
from dmoe.config.yaml_guard import INTEGER, NUMBER, short

SCHEMA = Path(__file__).with_name("schema")
YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
TEXT = ("str", "str | null")
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "0", "1")
LARGEST_INTEGER = (1 << 63) - 1
DECIMAL = {"int": re.compile(INTEGER), "float": re.compile(NUMBER)}
"""Text that a field for numbers may hold, by the first word of its type or of its items' type."""


@dataclass(frozen=True)
class Field:
    """One field of the schema."""

    name: str
    """Dotted, as in an override: `moe.router.kind`."""
    type: str
    """`int`, `float | null`, or the allowed words: `packed | padded`."""
    default: str
    """In YAML."""
    doc: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


@cache
def list_fields() -> tuple[Field, ...]:
    """List all fields in schema order, a section's own fields before its subsections.

    Imports neither torch nor OmegaConf. The schema is parsed once per process.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SCHEMA.glob("*.py"))]
    classes = {
        node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    }
    return tuple(_walk(classes, "Config", ""))


def _walk(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[Field]:
    body = classes[name].body
    sections: list[tuple[str, str]] = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        assert isinstance(node.target, ast.Name)
        path, kind = shown(f"{prefix}{node.target.id}"), ast.unparse(node.annotation)
        if kind in classes:
            sections.append((kind, f"{path}."))
        else:
            yield Field(path, _type(node.annotation), _default(node.value), _docstring(after))
    for kind, path in sections:
        yield from _walk(classes, kind, path)


def _docstring(node: ast.stmt | None) -> str:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return " ".join(node.value.value.split())
    return ""


def _type(node: ast.expr) -> str:
    """Spell a type: `Optional[int]` -> `int | null`; `Literal["a", "b"]` -> `a | b`."""
    if not isinstance(node, ast.Subscript):
        return ast.unparse(node)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    outer = ast.unparse(node.value)
    if outer == "Annotated":
        return next((word for word in map(_words, inner[1:]) if word), _type(inner[0]))
    if outer == "Optional":
        return f"{_type(inner[0])} | null"
    if outer == "Union":
        return " | ".join(map(_type, inner))
    if outer == "Literal":
        return " | ".join(_word(item) for item in inner)
    return ast.unparse(node)


def _words(constraint: ast.expr) -> str:
    """Spell `one_of("a", "b")` as `a | b | FILE.py:Name`; empty for another constraint."""
    if not isinstance(constraint, ast.Call) or ast.unparse(constraint.func) != "one_of":
        return ""
    return " | ".join([*map(_word, constraint.args), FORM])


def _default(node: ast.expr | None) -> str:
    if isinstance(node, ast.Call):  # field(default_factory=list)
        factory = next(
            keyword.value for keyword in node.keywords if keyword.arg == "default_factory"
        )
        return {"list": "[]", "dict": "{}"}[ast.unparse(factory)]
    assert node is not None, "every field has a default"
    return _word(node)


def _word(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        plain = node.value == node.value.strip() != ""
        return node.value if plain else f'"{node.value}"'
    text = ast.unparse(node)
    return YAML_WORDS.get(text, text)


def field_named(name: str) -> Field | None:
    """Return the field with this dotted name, or None."""
    return next((field for field in list_fields() if field.name == name), None)


def check_given(given: Mapping[Any, Any], source: str = "") -> None:
    """Refuse the first key or value of `given` that the schema does not have.

    Args:
        given: nested plain values, as read from YAML.
        source: the file they are from; empty for the command line.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    known = {field.name: field for field in list_fields()}
    _check_section(given, "", known, f" (in {source})" if source else "")


def _check_section(
    given: Mapping[Any, Any], prefix: str, known: dict[str, Field], source: str
) -> None:
    """Check one section; `prefix` is its dotted name and a dot."""
    children = _children(prefix, known)
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in children:
            near = suggest_field(str(key), prefix, list(known), children)
            names = ", ".join(children)
            fix = f"did you mean {near}?" if near else f"known here: {names}"
            shown = REDACTED if is_secret_name(name) else short(value)
            raise ConfigError(short(name), shown, f"there is no such field{source}", fix)
        if name in known:
            _check_value(known[name], value, source)
        elif isinstance(value, Mapping):
            _check_section(value, f"{name}.", known, source)
        else:
            fix = f"set one of its fields: {', '.join(_children(f'{name}.', known))}"
            raise ConfigError(name, short(value), f"is a section, not a value{source}", fix)


def _children(prefix: str, known: dict[str, Field]) -> list[str]:
    """List the fields and sections directly in a section, in schema order."""
    names = (name.removeprefix(prefix) for name in known if name.startswith(prefix))
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def _check_value(field: Field, value: Any, source: str) -> None:
    """Refuse a value of the wrong type. What is left to OmegaConf: words, and text as a number."""
    if value is None and field.type.endswith("| null"):
        return
    for wrong, allowed, fix in _type_errors(field, value):
        raise ConfigError(field.name, short(wrong), f"{allowed}{source}", fix)


def _type_errors(field: Field, value: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield the part of the value that is wrong, what is allowed, and the fix."""
    items = value if isinstance(value, list) else [value]
    default = f"the default is {field.default}"
    if field.type.endswith(FORM):
        words = field.type.split(" | ")
        if value not in words[:-1] and parse(value, field.name) is None:
            near = difflib.get_close_matches(str(value).lower(), words[:-1], n=1)
            fix = f"did you mean {near[0]}?" if near else default
            yield value, f"must be {' or '.join(words)}", fix
        return
    if field.type.startswith("dict["):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            yield value, "must be a mapping with names as keys", "e.g. {name: value}"
        return
    if "???" in items:
        yield "???", "stands for a value that is missing", "write a value"
    if field.type in TEXT or (field.type == "list[str]" and isinstance(value, list)):
        for text in items if field.type == "list[str]" else [value]:
            if not isinstance(text, str):
                yield text, f"must be text, and YAML reads it as {_kind(text)}", "quote it"
    if isinstance(value, Mapping) or (
        field.type.startswith("list[") and not isinstance(value, list)
    ):
        yield value, f"must be {field.type.replace(' | ', ' or ')}", default
        return
    if field.type == "list[list[int]]" and not _lists_of_integers(value):
        yield value, "must be a list of lists of whole numbers", "e.g. [[], [50], [64, 32]]"
    if field.type.startswith("bool") and str(value).lower() not in BOOLEANS:
        yield value, "must be true or false", default
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        yield value, "does not fit in 64 bits", default
    if field.type.startswith("float") and not _is_finite(value):
        yield value, "must be a finite number", default
    kind = field.type.removeprefix("list[").partition(" ")[0].rstrip("]")
    for item in items if kind in DECIMAL else []:
        has_digit = isinstance(item, str) and any(map(str.isdigit, item))
        if has_digit and not DECIMAL[kind].fullmatch(item):
            whole = "whole " if kind == "int" else ""
            or_word = f" or {field.default}" if "str" in field.type else ""
            allowed = f"must be a {whole}number in decimal notation{or_word}"
            yield item, allowed, "use digits only: no leading zeros, no +, no _, no other base"


def check_accept_changes(names: Sequence[str]) -> None:
    """Refuse a name in `checkpoint.accept_changes` that is neither a field nor a section.

    A typo would accept nothing, and would be noticed only when the run is resumed.

    Raises:
        ConfigError: for the first such name.
    """
    fields = [field.name for field in list_fields()]
    sections = {name[:end] for name in fields for end, letter in enumerate(name) if letter == "."}
    known = [*fields, *sorted(sections)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]}?" if near else "see `dmoe explain --fields`"
            allowed = "is neither a field nor a section of the config"
            raise ConfigError("checkpoint.accept_changes", name, allowed, fix)


def _lists_of_integers(value: Any) -> bool:
    lists = value if isinstance(value, list) else [None]
    return all(
        isinstance(item, list) and all(type(number) is int for number in item) for item in lists
    )


def _is_finite(value: Any) -> bool:
    """Return whether OmegaConf would read a finite number; it reads the text `nan` as one too."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return True  # not a number at all: OmegaConf refuses it


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "the number {}",
        float: "the number {}",
        dict: "a mapping",
        list: "a list",
    }
    return names.get(type(value), "something else").format(value)
