"""Rules on imports, unsafe calls and file length, checked in the source with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dmoe"
LEVELS = [
    ("cli",),
    ("bench",),
    ("doctor", "explain", "verify", "simulation", "conversion"),
    ("train",),
    ("observability",),
    ("report",),
    ("hf",),
    ("modular", "models", "distributed"),
    ("moe", "runs", "checkpoint", "data", "replay"),
    ("config",),
]
LEVEL_OF = {name: len(LEVELS) - position for position, names in enumerate(LEVELS) for name in names}
ROOT_MODULES = {
    "": {"config", "distributed", "hf", "models", "moe", "train"},
    "__main__": {"cli"},
}
"""`dmoe/__init__.py` exports the public names, `dmoe/__main__.py` runs the command line."""
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
MAX_LINES = 300


def violations(package: Path) -> list[str]:
    """Return every broken rule with its file."""
    found = []
    for file in sorted(package.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        path = file.relative_to(package)
        tree = ast.parse(source)
        found += [
            f"{path}: {violation}"
            for violation in (*arrows(tree, path), *collectives(tree, path), *unsafe(tree))
        ]
        if (lines := len(source.splitlines())) > MAX_LINES:
            found.append(f"{path}: {lines} lines, more than {MAX_LINES}")
    return found


def imported(tree: ast.Module, path: Path) -> Iterator[str]:
    """Yield all imported modules and names, dotted and absolute (`dmoe.a.b`)."""
    package = ("dmoe", *path.parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for an attribute chain; empty if it does not start with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def arrows(tree: ast.Module, path: Path) -> Iterator[str]:
    owner = path.parts[0] if len(path.parts) > 1 else ""
    stem = "" if path.stem == "__init__" else path.stem
    if owner and owner not in LEVEL_OF:
        yield f"package {owner} has no level"
        return
    if not owner and stem not in ROOT_MODULES:
        yield "a module beside the packages"
        return
    for name in imported(tree, path):
        parts = name.split(".")
        if parts[0] != "dmoe" or len(parts) < 2 or parts[1].startswith("__"):
            continue
        target = parts[1]
        if target not in LEVEL_OF:
            # a name that dmoe/__init__.py exports, such as MoE
            if owner:
                yield f"imports {name} through dmoe/__init__.py"
        elif not owner:
            if target not in ROOT_MODULES[stem]:
                yield f"imports {name}"
        elif target != owner and LEVEL_OF[target] >= LEVEL_OF[owner]:
            yield f"imports {name}: arrows point down"
        elif owner == "data" and target not in ("data", "config"):
            yield f"imports {name}: data knows config only"


def collectives(tree: ast.Module, path: Path) -> Iterator[str]:
    if path.parts[0] in ("distributed", "checkpoint"):
        return
    for name in imported(tree, path):
        if name == "torch.distributed" or name.startswith("torch.distributed."):
            yield f"imports {name} outside distributed"
    torch_names = {"torch"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "torch" and alias.asname
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and dotted(node.value) in torch_names
        ):
            yield f"line {node.lineno}: uses torch.distributed outside distributed"
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("torch.distributed")
        ):
            yield f"line {node.lineno}: names torch.distributed in a string outside distributed"


def unsafe(tree: ast.Module) -> Iterator[str]:
    for name in imported(tree, Path("x.py")):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield f"imports {name}"
        if name in FORBIDDEN_CALLS:
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: calls {dotted(node.func)}"


def test_the_product_keeps_the_rules() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 20
    assert violations(PACKAGE) == []


BROKEN = {
    "upwards": ("moe/a.py", "from dmoe.distributed.init import rank"),
    "upwards, relative": ("moe/routers/a.py", "from ...train import trainer"),
    "upwards, inside a function": ("moe/a.py", "def f():\n    import dmoe.cli.main"),
    "upwards, for the type checker": (
        "models/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dmoe.train import t",
    ),
    "sideways": ("models/a.py", "from dmoe.distributed import init"),
    "models to published ones": ("models/a.py", "from dmoe.hf import moefy"),
    "sideways, the package": ("models/a.py", "from dmoe import modular"),
    "config upwards": ("config/a.py", "import dmoe.moe.layer"),
    "data and moe": ("data/a.py", "from dmoe.moe import routing"),
    "through the root": ("models/a.py", "from dmoe import MoE"),
    "an unknown package": ("misc/a.py", "x = 1"),
    "a module beside the packages": ("helpers.py", "x = 1"),
    "root to the command line": ("__init__.py", "from dmoe.cli import t"),
    "collective": ("moe/a.py", "import torch.distributed as dist"),
    "collective, from torch": ("train/a.py", "from torch import distributed"),
    "collective, below": ("cli/a.py", "from torch.distributed.checkpoint import save"),
    "collective, by attribute": (
        "train/a.py",
        "import torch\nok = torch.distributed.is_initialized()",
    ),
    "collective, by another name": (
        "train/a.py",
        "import torch as t\nok = t.distributed.is_initialized()",
    ),
    "collective, by a string": (
        "moe/a.py",
        "import importlib\nd = importlib.import_module('torch.distributed')",
    ),
    "pickle": ("train/a.py", "import pickle"),
    "pickle, from": ("distributed/a.py", "from pickle import loads"),
    "eval": ("cli/a.py", "x = eval('1')"),
    "exec": ("cli/a.py", "exec('1')"),
    "yaml": ("config/a.py", "import yaml\nyaml.load('a: 1')"),
    "yaml, from": ("config/a.py", "from yaml import load"),
    "too long": ("moe/a.py", "x = 1\n" * (MAX_LINES + 1)),
}
ALLOWED = {
    "downwards": (
        "train/a.py",
        "from dmoe.distributed import init\nfrom dmoe.models import x\n"
        "from dmoe.config.schema import Config",
    ),
    "inside": (
        "moe/a.py",
        "from dmoe.moe.routing import Routing\nfrom . import b\nfrom .routing import Routing",
    ),
    "version": ("cli/a.py", "from dmoe import __version__"),
    "collective in distributed": (
        "distributed/a.py",
        "import torch.distributed as dist\ndist.barrier()",
    ),
    "a method called eval": ("train/a.py", "model.eval()"),
    "safe yaml": ("config/a.py", "import yaml\nyaml.safe_load('a: 1')"),
    "long enough": ("moe/a.py", "x = 1\n" * MAX_LINES),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found(name: str, tmp_path: Path) -> None:
    assert len(violations(tree_with(tmp_path, *BROKEN[name]))) >= 1


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_code_has_no_violation(name: str, tmp_path: Path) -> None:
    assert violations(tree_with(tmp_path, *ALLOWED[name])) == []


def tree_with(folder: Path, path: str, source: str) -> Path:
    file = folder / "dmoe" / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    return folder / "dmoe"
