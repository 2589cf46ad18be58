"""Apply the mutations one at a time in a copy of the tree and print what sees each.

    python -m tests.verify.mutate            all of them: `verify`, and the tests where it is green
    python -m tests.verify.mutate 3 17       only these numbers
    python -m tests.verify.mutate --list     only the list, with file and line

Outside CI: one mutation takes as long as `dmoe verify --worlds 1,2`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.verify.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SHORT = ["model.layers=2", "moe.num_experts=4"]
TIMEOUT = 900


@dataclass(frozen=True)
class Outcome:
    """What saw one mutation."""

    seen_by: str
    """`verify`, `tests`, `crash`, `timeout` or `nothing`."""
    first: str = ""
    named: bool = False
    """The first row has the right area."""


def line_of(mutation: Mutation) -> int:
    """Return the line of the mutated text; an AssertionError if it does not occur exactly once."""
    text = (ROOT / "dmoe" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.file}: {mutation.old!r}"
    return text[: text.index(mutation.old)].count("\n") + 1


def run(copy: Path, mutation: Mutation) -> Outcome:
    """Run `verify` on the mutated copy and, where it is green, the tests."""
    path = copy / "dmoe" / mutation.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return _verify(copy, mutation) or _tests(copy, mutation)
    except subprocess.TimeoutExpired:
        return Outcome("timeout")
    finally:
        path.write_text(original, encoding="utf-8")


def _verify(copy: Path, mutation: Mutation) -> Outcome | None:
    command = [*SHORT, *mutation.settings.split(), "--worlds", "1,2", "--json"]
    result = _python(copy, ["-m", "dmoe", "verify", *command])
    if result.returncode == 0:
        return None
    try:
        rows = json.loads(result.stdout)["rows"]
    except ValueError:
        return Outcome("crash", (result.stderr.strip().splitlines() or ["no message"])[-1])
    red = sorted((row for row in rows if not row["ok"]), key=lambda row: row["follows"])
    first, where = red[0]["quantity"], red[0]["where"]
    raised = first == "every rank finishes" and f"raised in dmoe/{mutation.file}" in where
    named = raised or first in mutation.rows.split("|")
    return Outcome("verify", f"{first}: {where}" if raised else first, named)


def _tests(copy: Path, mutation: Mutation) -> Outcome:
    places = mutation.tests.split() or ["tests"]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-n", "1", "-m", "not slow and not drills"]
    result = _python(copy, ["-m", "pytest", *options, *places])
    if result.returncode == 0:
        return Outcome("nothing")
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Outcome("tests", failed[0].split(" ")[1] if failed else "", named=True)


def _python(copy: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def main(arguments: list[str]) -> None:
    """Print one line per mutation, and the totals."""
    numbers = [int(a) for a in arguments if a.isdigit()] or range(1, len(MUTATIONS) + 1)
    chosen = {n: MUTATIONS[n - 1] for n in numbers}
    lines = {n: line_of(mutation) for n, mutation in chosen.items()}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "*.egg-info", "runs"))
        for n, mutation in chosen.items():
            place = f"{n:3} dmoe/{mutation.file}:{lines[n]}"
            if "--list" in arguments:
                print(f"{place}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}")
                continue
            outcome = run(copy, mutation)
            outcomes.append(outcome)
            right = "right" if outcome.named else "WRONG" if outcome.first else ""
            print(f"{place:50} {outcome.seen_by:8} {right:6} {outcome.first}", flush=True)
    seen = {
        kind: [o for o in outcomes if o.seen_by == kind] for kind in ("verify", "tests", "crash")
    }
    print(
        f"{len(outcomes)} mutations: {len(seen['verify'])} seen by verify, "
        f"{sum(o.named for o in seen['verify'])} of them named right, "
        f"{len(seen['tests'])} by the tests, {len(seen['crash'])} crashed it"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
