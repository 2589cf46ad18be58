"""The glossary names real symbols, and the code uses the field's terms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from dmoe.config.fields import list_fields
from tests.docs.snippets import ROOT
from tests.house import sources

GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRY = re.compile(r"^\| ([^|]+) \| ([^|]+) \| `([^`|]+)` \|$", re.M)
ENTRIES = ENTRY.findall(GLOSSARY.read_text(encoding="utf-8"))
MAX_ENTRIES = 64
BANNED = re.findall(
    r"\w+",
    "abandon alone as_many bent calm choir complain dear everybody fly glyph hear heard home homes "
    "journey judge keeper lap listener look meet nobody orphan owed peers person price roll_call "
    "room settle singer stir tell ticket told travel travelling twin unmeasured verdict voice wake",
)
"""Metaphors and coined words that earlier versions used in place of the field's terms."""


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of all functions, classes and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def words_of(name: str) -> str:
    """Return a name in lower case with `_` between and around its words."""
    return f"_{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', name).lower()}_"


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Return what a module or a class defines at its top level, by name."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.Assign):
            found |= {name.id: node for name in node.targets if isinstance(name, ast.Name)}
    return found


@cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def exists(symbol: str) -> bool:
    """Return True for `FILE:NAME`, `FILE:CLASS.MEMBER` or a config field that exists."""
    path, _, dotted = symbol.partition(":")
    if not dotted:
        return path in {field.name for field in list_fields()}
    if not (ROOT / path).is_file():
        return False
    body = parsed(path).body
    for name in dotted.split("."):
        node = members(body).get(name)
        if node is None:
            return False
        body = getattr(node, "body", [])
    return True


@pytest.mark.parametrize(("term", "meaning", "symbol"), ENTRIES, ids=[row[0] for row in ENTRIES])
def test_each_symbol_of_the_glossary_exists(term: str, meaning: str, symbol: str) -> None:
    assert exists(symbol), f"{term}: {symbol} is neither in the code nor a field of the config"
    assert 1 <= len(re.findall(r"[.:](?: |$)", meaning)) <= 3, f"{term}: one or two sentences"


def test_the_glossary_is_short_and_whole() -> None:
    rows = [
        line
        for line in GLOSSARY.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| term ")
    ]
    assert len(rows) == len(ENTRIES) <= MAX_ENTRIES
    terms = [term for term, _, _ in ENTRIES]
    assert len(set(terms)) == len(terms)


def test_a_symbol_that_does_not_exist_is_found() -> None:
    for symbol in (
        "dmoe/moe/layer.py:Missing",
        "dmoe/moe/layer.py:MoE.missing",
        "dmoe/missing.py:MoE",
        "moe.missing",
    ):
        assert not exists(symbol), symbol


@cache
def product_names() -> tuple[tuple[str, str], ...]:
    """Return where each function, class, argument, file and package of dmoe is, and its words."""
    return tuple(
        (f"{path}: {name}", words_of(name))
        for path, text in sources().items()
        for name in [*path.with_suffix("").parts, *defined_names(ast.parse(text))]
    )


@pytest.mark.parametrize("word", BANNED)
def test_no_banned_word_names_anything(word: str) -> None:
    assert not [place for place, words in product_names() if f"_{word}_" in words]


def test_a_banned_word_inside_a_name_is_found() -> None:
    tree = ast.parse("class RollCall:\n    def at_home(self, journey): ...")
    names = [words_of(name) for name in defined_names(tree)]
    assert names == ["_roll_call_", "_at_home_", "_self_", "_journey_"]
