"""Every field of the schema with its type, default and docstring, read from the source of schema/: the text is written once, there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Field", "list_fields"]

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
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
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
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
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
        factory = next(keyword.value for keyword in node.keywords if keyword.arg == "default_factory")
        return {"list": "[]", "dict": "{}"}[ast.unparse(factory)]
    assert node is not None, "every field has a default"
    return _word(node)


def _word(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        plain = node.value == node.value.strip() != ""
        return node.value if plain else f'"{node.value}"'
    text = ast.unparse(node)
    return WORDS.get(text, text)
