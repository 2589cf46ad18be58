"""Every fault of docs/reliability.md has a drill. This test is no drill and always runs.

Docstrings of modules and tests name their faults: `Fault 4: ...`, `Faults 7 and 8`, `Drills 1, 2, 3
and 5`, with a capital letter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FAULTS = range(1, 45)
RANDOM_FAULTS = "random_faults.py"
"""Drill of ten minutes, a separate program."""
NUMBERS = re.compile(r"\b(?:Fault|Drill)s?\s+(\d+(?:(?:\s*,\s*|\s+and\s+|\s*,\s*and\s+)\d+)*)")


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of the module and of its tests."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module) or (
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ):
            yield ast.get_docstring(node) or ""


def numbers(docstring: str) -> set[int]:
    """Return the faults that a docstring names."""
    return {
        int(number)
        for match in NUMBERS.finditer(docstring)
        for number in re.findall(r"\d+", match[1])
    }


def drills() -> dict[int, set[str]]:
    """Return the files by fault."""
    found: dict[int, set[str]] = {}
    for path in [*sorted(HERE.glob("test_*.py")), HERE / RANDOM_FAULTS]:
        if path.name == Path(__file__).name:
            continue
        for number in (number for docstring in docstrings(path) for number in numbers(docstring)):
            found.setdefault(number, set()).add(path.name)
    return found


def test_every_fault_has_its_drill() -> None:
    found = drills()
    absent = [number for number in FAULTS if number not in found]
    assert not absent, (
        f"no drill for faults {absent}; there are "
        f"{ ({n: sorted(found[n]) for n in sorted(found)}) }"
    )
    assert set(found) <= set(FAULTS), "a drill for a fault that is not in the table"


def test_the_table_of_the_documentation_names_the_files_of_each_drill() -> None:
    text = (HERE.parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = {
        int(row[1]): set(re.findall(r"`(\w+\.py)`", row[2]))
        for row in re.finditer(r"^\| (\d+) \|.*\|(.*)\|$", text, re.M)
    }
    assert list(rows) == list(FAULTS)
    found = drills()
    for number, files in rows.items():
        assert files, f"row {number} names no test"
        assert files <= found[number], (
            f"row {number}: {files}, but the drills are in {found[number]}"
        )


def test_every_file_with_a_drill_is_marked() -> None:
    """Without the marker, a drill would run for minutes in the default suite."""
    for name in {name for names in drills().values() for name in names} - {RANDOM_FAULTS}:
        assert "pytest.mark.drills" in (HERE / name).read_text(encoding="utf-8"), name


def test_numbers_in_docstrings_are_found() -> None:
    assert numbers("Fault 4: a death") == {4}
    assert numbers("Drills 1, 2, 3 and 5: ranks that are killed") == {1, 2, 3, 5}
    assert numbers("Faults 26 and 27: what the run does") == {26, 27}
    assert numbers("Drills 7, 8, 9 and SIGUSR1: all ranks stop") == {7, 8, 9}
    assert numbers("Faults 1, 2, and 3.") == {1, 2, 3}
    assert numbers("Given to the real command. Fault 32 of the list.") == {32}
    assert numbers("As in drill 5: 200 defaults, 3 ranks") == set()
