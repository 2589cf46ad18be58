"""`.ci/run`: its stages, order and exit status; constraints.txt against pyproject.toml."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash") or "/bin/bash"

PYTHON = """#!{bash}
[[ "$1" == -c ]] && exec {python} "$@"
mkdir -p "$3/bin"
for name in pip ruff mypy pytest chromium; do
  printf '%s\\n' '#!{bash}' "echo $name \\"\\$*\\" >>'{record}'" "{fail}" >"$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""


def run(tmp_path: Path, fail: str = "") -> tuple[int, str, list[str]]:
    """Run .ci/run with programs that only record their arguments: (status, stdout, commands)."""
    record = tmp_path / "record"
    python = tmp_path / "python"
    python.write_text(
        PYTHON.format(bash=BASH, python=sys.executable, record=record, fail=fail), encoding="utf-8"
    )
    python.chmod(0o755)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "TMPDIR": str(scratch)}
    done = subprocess.run(
        [str(ROOT / ".ci" / "run")],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not list(scratch.iterdir()), "the virtual environment was left behind"
    return done.returncode, done.stdout, record.read_text(encoding="utf-8").splitlines()


def test_the_stages_and_their_headings(tmp_path: Path) -> None:
    status, stdout, commands = run(tmp_path)
    assert status == 0
    install = "pip install -c constraints.txt -e .[test] --no-compile"
    assert [command.strip() for command in commands] == [
        install,
        "ruff check",
        "ruff format --check",
        "mypy",
        "pytest",
        "pytest -m ranks or slow or drills",
        "pip install -q -c constraints.txt -e .[kernels]",
        "pytest -m slow tests/moe/test_triton_kernels.py",
    ]
    assert len(re.findall(r"^== .* \(\d+ s\)$", stdout, re.M)) == 10
    line = "pip install -c constraints.txt -e '.[test]' && pytest\n"
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")
    assert line.split(" && ")[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fail", "code", "last"),
    [
        ("[[ $name == mypy ]] && exit 1 || exit 0", 1, "mypy"),
        ("[[ $name == pytest ]] && exit 5 || exit 0", 5, "pytest"),
        (
            '[[ $name == pytest && \\"\\$*\\" == *slow* ]] && exit 1 || exit 0',
            1,
            "pytest -m ranks or slow or drills",
        ),
    ],
    ids=["types", "nothing collected in the main run", "ranks, slow, drills"],
)
def test_a_failure_ends_the_run(fail: str, code: int, last: str, tmp_path: Path) -> None:
    status, _, commands = run(tmp_path, fail=fail)
    assert status == code
    assert commands[-1].strip() == last


@pytest.mark.parametrize("tier", ["ranks", "slow", "drills"])
def test_each_tier_has_tests(tier: str) -> None:
    """They are one run, which would not miss a tier."""
    marks = re.compile(rf"^(?:@|pytestmark = .*)pytest\.mark\.{tier}\b", re.M)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if marks.search(path.read_text())]
    assert len(files) >= 10, files


def test_every_dependency_has_a_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        # torch for CUDA asks for one version of Triton, and for CPUs for none
        *(
            line
            for name, extra in project["optional-dependencies"].items()
            for line in extra
            if name != "kernels"
        ),
    ]
    for line in wanted:
        name, _, least = line.partition(">=")
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert tuple(map(int, re.findall(r"\d+", pinned[name]))) >= tuple(
            map(int, least.split("."))
        ), line
