"""The environment variables that the installed accelerate reads, found in its sources.

Read with `ast`: `os.environ.get(NAME)`, `os.environ[NAME]`, `NAME in os.environ`, `os.getenv`, and
accelerate's `parse_flag_from_env`, `parse_choice_from_env` and `get_int_from_env`. A name is a
constant, or a prefix that the function has assigned to a variable plus a constant.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import accelerate

OTHER_PROGRAMS = ("commands", "test_utils")
"""Subpackages that `accelerate launch` and accelerate's own tests run, not `Accelerator`."""
KEEPERS = ("patch_environment", "clear_environment", "purge_accelerate_environment")
"""Functions of accelerate that save variables of any name and restore them."""
READERS = ("parse_flag_from_env", "parse_choice_from_env", "get_int_from_env", "getenv")


@cache
def variables_read() -> frozenset[str]:
    """Return the names; raises AssertionError for a name that this program cannot find out."""
    found: set[str] = set()
    root = Path(accelerate.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in OTHER_PROGRAMS:
            found |= set(_Reads(path).names())
    return frozenset(found)


class _Reads:
    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, ast.parse(path.read_text(encoding="utf-8"))
        self.functions = [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]

    def names(self) -> Iterator[str]:
        kept = {
            node
            for function in self.functions
            if function.name in KEEPERS
            for node in ast.walk(function)
        }
        for node in ast.walk(self.tree):
            for argument in _arguments(node) if node not in kept else ():
                yield from self._values(argument)

    def _values(self, node: ast.expr) -> list[str]:
        """Return the texts that an expression can be."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.List | ast.Tuple):
            return [value for item in node.elts for value in self._values(item)]
        if isinstance(node, ast.BinOp):
            firsts, lasts = self._values(node.left), self._values(node.right)
            return [first + last for first in firsts for last in lasts]
        if isinstance(node, ast.Name):
            return self._assigned(node)
        raise AssertionError(f"{self.path}:{node.lineno}: which variable is {ast.unparse(node)}?")

    def _assigned(self, name: ast.Name) -> list[str]:
        """Return what the innermost function around a name assigns to it; none for a parameter.

        The readers themselves have the name as a parameter.
        """
        around = [f for f in self.functions if f.lineno <= name.lineno <= (f.end_lineno or 0)]
        for function in sorted(around, key=lambda f: -f.lineno):
            values = [
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and any(isinstance(t, ast.Name) and t.id == name.id for t in node.targets)
            ]
            if values:
                return [text for value in values for text in self._values(value)]
        return []


def _arguments(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expression of a variable's name, if `node` reads the environment."""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called.endswith("environ.get") or called.split(".")[-1] in READERS:
            yield node.args[0] if node.args else node.keywords[0].value
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        if ast.unparse(node.value).endswith("environ"):
            yield node.slice
    elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
        yield node.left
