"""Print the limits on the layout of the code and their present values: `python -m tests.house`.

Read from the source with `ast` and `tokenize`, except for the two traces, which run one plain MoE
forward and one plain training step (one process, one layer) under `sys.setprofile` and collect
the files of dmoe that they enter.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from dmoe.config.router_kinds import ROUTERS

PACKAGE = Path(__file__).parent.parent / "dmoe"
WIDTH = 100
_FIELD_WORD_TEXT = (
    "aux_loss load_balanc data_parallel process_group topk_ids tokens_per_expert unpermute "
    "checkpointer logger lora liveness heartbeat watchdog elastic rng scheduler loss_spike mfu "
    "registry dataset dataloader collate train_state state_dict reducer expert_parallel metadata "
    "adapter base_model frozen seed placement grad_norm callback mesh"
)
FIELD_WORDS = _FIELD_WORD_TEXT.split()
"""Words that an engineer of this field searches for (the first 25 named nothing in 2026-11)."""
INDIRECT_OPENINGS = ("what", "who", "which", "where", "whether", "of")
"""First words of a docstring that does not name its subject."""


def sources() -> dict[Path, str]:
    """Return the text of every file of the product by its path below `dmoe/`."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in paths}


def names_of(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a module defines or uses: functions, arguments, variables, fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def unused_field_words(files: dict[Path, str]) -> list[str]:
    """Return the field words that occur in no name and in no path."""
    found = {str(path).lower() for path in files}
    for text in files.values():
        found |= {name.lower() for name in names_of(ast.parse(text))}
    spelled = {name.replace("_", "") for name in found}
    return [
        word
        for word in FIELD_WORDS
        if not any(word in name for name in found)
        and not any(word.replace("_", "") in name for name in spelled)
    ]


def docstrings(files: dict[Path, str]) -> Iterator[str]:
    """Yield the docstring of every module, class and function."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kinds) and (doc := ast.get_docstring(node)):
                yield doc


def files_that_name_a_router_kind(files: dict[Path, str]) -> list[str]:
    """Return the files in which a router kind is compared with, or is the key of a table.

    A kind is also a common word (`budget`, `hash`, `soft`, `fixed`) and the name of a field
    (`top_k`), so a string counts where it is compared with an expression that ends in `kind` or
    `router`, or where two or more kinds stand in one tuple, list, set or dict.
    """
    return [str(path) for path, text in files.items() if _names_a_kind(ast.parse(text))]


def _names_a_kind(tree: ast.Module) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            is_kind = any(ast.unparse(side).endswith(("router.kind", "router")) for side in sides)
            if is_kind and any(_kinds_in(side) for side in sides):
                return True
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and len(_kinds_in(node)) > 1:
            return True
        if isinstance(node, ast.Dict):
            keys = [key for key in node.keys if isinstance(key, ast.Constant)]
            if len({key.value for key in keys} & ROUTERS.keys()) > 1:
                return True
    return False


def _kinds_in(node: ast.expr) -> set[str]:
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    values = {part.value for part in parts if isinstance(part, ast.Constant)}
    return {value for value in values if isinstance(value, str)} & ROUTERS.keys()


def import_circles(files: dict[Path, str]) -> list[list[str]]:
    """Return the groups of modules that import each other when they are loaded."""
    names = {_module_name(path): path for path in files}
    graph = {name: _loads(name, files[path], names) for name, path in names.items()}
    return [sorted(group) for group in _components(graph) if len(group) > 1]


def _module_name(path: Path) -> str:
    name = ".".join(("dmoe", *path.with_suffix("").parts))
    return name.removesuffix(".__init__")


def _loads(name: str, text: str, known: dict[str, Path]) -> set[str]:
    """Return the modules that `name` imports at its top level, their packages included."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dmoe"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in known else node.module
                parts = target.split(".")
                packages = {".".join(parts[:n]) for n in range(2, len(parts))}
                found |= {p for p in packages if p in known and not name.startswith(f"{p}.")}
                found.add(target)
    return found - {name}


def _components(graph: dict[str, set[str]]) -> Iterator[set[str]]:
    """Yield the strongly connected components: modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        visited, pending = set[str](), [start]
        while pending:
            for after in graph.get(pending.pop(), ()):
                if after not in visited:
                    visited.add(after)
                    pending.append(after)
        reach[start] = visited
    remaining = set(graph)
    while remaining:
        name = remaining.pop()
        group = {name} | {n for n in remaining if n in reach[name] and name in reach[n]}
        remaining -= group
        yield group


def entered(call: Callable[[], object]) -> set[str]:
    """Run `call` and return the files of dmoe that it enters."""
    found: set[str] = set()

    def note(frame: object, event: str, _: object) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)  # type: ignore[attr-defined]

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    own = f"{PACKAGE}/"
    return {name.removeprefix(own) for name in found if name.startswith(own)}


def files_of_a_forward() -> set[str]:
    """Return the files of one forward of a plain top-k layer in one process."""
    import torch

    from dmoe import MoE

    layer, x_TD = MoE(16, 32, num_experts=4, top_k=2), torch.randn(8, 16)
    layer(x_TD)  # not the first forward, which builds caches
    return entered(lambda: layer(x_TD))


def files_of_a_step() -> set[str]:
    """Return the files of one training step that is not the first and not logged."""
    from dmoe.config.load import load
    from dmoe.train import run, trainer

    found: set[str] = set()
    step = trainer.Trainer._step

    def traced(self: trainer.Trainer) -> object:
        if self.steps_done != 2:
            return step(self)
        results: list[object] = []
        found.update(entered(lambda: results.append(step(self))))
        return results[0]

    with tempfile.TemporaryDirectory() as folder:
        overrides = ["model.layers=1", "train.steps=4", "train.log_every=100", "data.seq_len=32"]
        quiet = ["train.global_batch=4", "checkpoint.every=0", "train.eval_every=0"]
        more = [f"train.run_dir={folder}/run", "tracking.trackers=[]", "train.eval_sequences=1"]
        trainer.Trainer._step = traced  # type: ignore[method-assign]
        try:
            run.train(load(None, [*overrides, *quiet, *more]), "", quiet=True)
        finally:
            trainer.Trainer._step = step  # type: ignore[method-assign]
    return found


def measure() -> dict[str, float]:
    """Return every count by name."""
    files = sources()
    lines = {path: text.splitlines() for path, text in files.items()}
    total = sum(map(len, lines.values()))
    packages = Counter[str]()
    folders = Counter[Path](path.parent for path in files)
    for path, text in lines.items():
        packages[path.parts[0]] += len(text)
    docs = list(docstrings(files))
    indirect = [doc for doc in docs if doc.split()[0].lower() in INDIRECT_OPENINGS]
    long = sum(len(line) > WIDTH for text in lines.values() for line in text)
    return {
        "product files": len(files),
        "product lines": total,
        "files of one MoE forward": len(files_of_a_forward()),
        "files of one training step": len(files_of_a_step()),
        "files that name a router kind": len(files_that_name_a_router_kind(files)),
        "largest package, share of lines": round(max(packages.values()) / total, 3),
        "files in a folder, at most": max(folders.values()),
        "field words that name nothing": len(unused_field_words(files)),
        "lines over 100 columns": long,
        "docstrings that open with What, Who, Which, Where, Whether, Of": len(indirect) / len(docs),
        "import circles": len(import_circles(files)),
        "files over 300 lines": sum(len(text) > 300 for text in lines.values()),
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{value:>9.3g}  {name}" if isinstance(value, float) else f"{value:>9,}  {name}")
    print("words:", ", ".join(unused_field_words(sources())))
    print("kinds:", ", ".join(files_that_name_a_router_kind(sources())))
    print("forward:", ", ".join(sorted(files_of_a_forward())))
    print("step:", ", ".join(sorted(files_of_a_step())))
