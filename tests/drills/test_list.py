"""Every fault of the list has its drill: the docstrings here say which. (No drill itself, so it runs in the ordinary suite.)

A module or a test says `Fault 4: ...`, `Faults 7 and 8`, `Drills 1, 2, 3 and 5`, in its docstring, with a capital letter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
FAULTS = range(1, 36)
SOAK = "random_faults.py"
"""The drill of ten minutes, a program of its own."""
SAID = re.compile(r"\b(?:Fault|Drill)s?\s+(\d+(?:(?:\s*,\s*|\s+and\s+|\s*,\s*and\s+)\d+)*)")


def docstrings(path: Path) -> Iterator[str]:
    """Of the module and of every test in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module) or (
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ):
            yield ast.get_docstring(node) or ""


def numbers(docstring: str) -> set[int]:
    """The faults a docstring names, at the beginning of a sentence."""
    return {
        int(number) for said in SAID.finditer(docstring) for number in re.findall(r"\d+", said[1])
    }


def drills() -> dict[int, set[str]]:
    """By fault, the files that claim it."""
    found: dict[int, set[str]] = {}
    for path in [*sorted(HERE.glob("test_*.py")), HERE / SOAK]:
        if path.name == Path(__file__).name:
            continue
        for number in (number for docstring in docstrings(path) for number in numbers(docstring)):
            found.setdefault(number, set()).add(path.name)
    return found


def test_every_fault_has_its_drill() -> None:
    found = drills()
    absent = [number for number in FAULTS if number not in found]
    assert not absent, (
        f"no drill says that it is of fault {absent}; there are { ({n: sorted(found[n]) for n in sorted(found)}) }"
    )
    assert set(found) <= set(FAULTS), "a drill of a fault that is not on the list"


def test_the_table_of_the_documentation_names_each_drill_where_it_is() -> None:
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
    """Without the marker a drill would run in the ordinary suite, and for minutes."""
    for name in {name for names in drills().values() for name in names} - {SOAK}:
        assert "pytest.mark.drills" in (HERE / name).read_text(encoding="utf-8"), name


def test_the_numbers_are_read_as_people_write_them() -> None:
    assert numbers("Fault 4: a death") == {4}
    assert numbers("Drills 1, 2, 3 and 5: ranks that are killed") == {1, 2, 3, 5}
    assert numbers("Faults 26 and 27: what the run does") == {26, 27}
    assert numbers("Drills 7, 8, 9 and SIGUSR1: who is told") == {7, 8, 9}
    assert numbers("Faults 1, 2, and 3.") == {1, 2, 3}
    assert numbers("Given to the real command. Fault 32 of the list.") == {32}
    assert numbers("As in drill 5: 200 defaults, 3 ranks") == set()
