"""Every field of the schema with its type, default and docstring, read from the source of schema/: the text is written once, there.

What a user gave, as plain values, held against the schema: unknown keys, sections that are none, values of another type.

OmegaConf checks types too, but turns the number 83 (YAML's reading of 0123) into the text "83", and its words name neither the
file nor the nearest field.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.secrets import REDACTED, names_secret
from dmoe.config.yaml_guard import short

SCHEMA = Path(__file__).with_name("schema")
WORDS = {"None": "null", "True": "true", "False": "false"}
"""As they are written in YAML."""


@dataclass(frozen=True)
class Field:
    name: str
    """Dotted, as in an override: `moe.router.kind`."""
    type: str
    """`int`, `float | null`, or the allowed words: `packed | padded`."""
    default: str
    """As it would be written in YAML."""
    doc: str

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


def list_fields() -> list[Field]:
    """All fields, in the order of the schema, a section's own fields before its subsections. Imports neither torch nor OmegaConf."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SCHEMA.glob("*.py"))]
    classes = {
        node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    }
    return list(_walk(classes, "Config", ""))


def _walk(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[Field]:
    body = classes[name].body
    sections: list[tuple[str, str]] = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        assert isinstance(node.target, ast.Name)
        path, kind = f"{prefix}{node.target.id}", ast.unparse(node.annotation)
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
    """`Optional[int]` -> `int | null`; `Literal["a", "b"]` -> `a | b`."""
    if not isinstance(node, ast.Subscript):
        return ast.unparse(node)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    outer = ast.unparse(node.value)
    if outer == "Optional":
        return f"{_type(inner[0])} | null"
    if outer == "Union":
        return " | ".join(map(_type, inner))
    if outer == "Literal":
        return " | ".join(_word(item) for item in inner)
    return ast.unparse(node)


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
    return WORDS.get(text, text)


TEXT = ("str", "str | null")
LARGEST = (1 << 63) - 1


def field_named(name: str) -> Field | None:
    return next((field for field in list_fields() if field.name == name), None)


def refuse_wrong(given: Mapping[Any, Any], source: str = "") -> None:
    """Raises ConfigError for the first key or value of `given` that the schema does not have.

    source: the file it is from; empty for the command line.
    """
    _refuse_section(
        given,
        "",
        {field.name: field for field in list_fields()},
        f" (in {source})" if source else "",
    )


def _refuse_section(
    given: Mapping[Any, Any], prefix: str, known: dict[str, Field], source: str
) -> None:
    here = _below(prefix, known)
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in here:
            near = difflib.get_close_matches(str(key), here, n=1)
            fix = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(here)}"
            shown = REDACTED if names_secret(name) else short(value)
            raise ConfigError(short(name), shown, f"there is no such field{source}", fix)
        if name in known:
            _refuse_value(known[name], value, source)
        elif isinstance(value, Mapping):
            _refuse_section(value, f"{name}.", known, source)
        else:
            fix = f"set one of its fields: {', '.join(_below(f'{name}.', known))}"
            raise ConfigError(name, short(value), f"is a section, not a value{source}", fix)


def _below(prefix: str, known: dict[str, Field]) -> list[str]:
    """Fields and sections right below a section, in the order of the schema."""
    return list(
        dict.fromkeys(
            name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)
        )
    )


def _refuse_value(field: Field, value: Any, source: str) -> None:
    for text in value if isinstance(value, list) else [value]:
        if text == "???":
            raise ConfigError(
                field.name, text, f"stands for a value that is missing{source}", "write a value"
            )
    if value is None and field.type.endswith("| null"):
        return
    if field.type in TEXT and not isinstance(value, str):
        raise ConfigError(
            field.name,
            short(value),
            f"must be text, and YAML reads it as {_kind(value)}{source}",
            "quote it",
        )
    if field.type == "list[str]" and isinstance(value, list):
        wrong = next((item for item in value if not isinstance(item, str)), None)
        if wrong is not None:
            raise ConfigError(
                field.name,
                short(wrong),
                f"must be text, and YAML reads it as {_kind(wrong)}{source}",
                "quote it",
            )
    if field.type == "list[list[int]]" and not _lists_of_integers(value):
        raise ConfigError(
            field.name,
            short(value),
            f"must be a list of lists of whole numbers{source}",
            "e.g. [[], [50], [64, 32]]",
        )
    if field.type == "bool" and not isinstance(value, str | bool) and value not in (0, 1):
        raise ConfigError(
            field.name,
            short(value),
            f"must be true or false{source}",
            f"the default is {field.default}",
        )
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(
            field.name,
            short(value),
            f"does not fit in 64 bits{source}",
            f"the default is {field.default}",
        )
    if field.type.startswith("float") and not _finite(value):
        raise ConfigError(
            field.name, value, f"must be a finite number{source}", f"the default is {field.default}"
        )


def _lists_of_integers(value: Any) -> bool:
    lists = value if isinstance(value, list) else [None]
    return all(
        isinstance(one, list) and all(type(number) is int for number in one) for one in lists
    )


def _finite(value: Any) -> bool:
    """Text is a number to OmegaConf if it can be read as one: `nan` without a dot too."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return True  # no number at all: OmegaConf refuses it


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
