"""What the documents say is true: examples print what is shown, commands parse, names exist, figures are filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

import dmoe
from dmoe.cli.common import load_arguments
from dmoe.cli.main import app
from dmoe.config.fields import list_fields
from dmoe.config.rules import check
from tests.docs.snippets import DOCUMENTS, ROOT, Block, blocks, command_lines, run, snippets

pytestmark = pytest.mark.ranks

EXAMPLES = [pair for document in DOCUMENTS for pair in snippets(document)]
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
REPOSITORY_PATH = re.compile(
    r"(?:dmoe|examples|configs|launch|docker|tests|docs|benchmarks|\.ci)/[\w./-]*"
)
SECTIONS = [
    "model",
    "moe",
    "modular",
    "parallel",
    "data",
    "train",
    "optim",
    "checkpoint",
    "guard",
    "alerts",
    "tracking",
    "debug",
]
FIELD = re.compile(rf"((?:{'|'.join(SECTIONS)})\.[a-z_.]+?)(?:=\S+|: .*)?")
WITH_CONFIG = ("train", "verify", "explain")
PLACEHOLDERS = {"CONFIG"}
OF_THE_READER = {"my.yaml", "data.source=my.csv", "data.source=shards", "model.source=DIRECTORY"}
"""Files that only a reader has: of such a command the options alone are checked."""
NEEDED = {
    "sweep": ["moe.top_k=1,2"],
    "bench": ["layer"],
    "generate": ["runs/latest", "--prompt", "def"],
    "evaluate": ["runs/latest"],
    "report": ["runs/latest"],
    "watch": ["runs/latest"],
    "checkpoint": ["inspect", "runs/latest"],
    "compare": ["runs/latest"],
    "modules": ["list", "runs/latest"],
}
"""What a command cannot do without."""
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    content = document.read_text(encoding="utf-8")
    for block in blocks(document):
        content = content.replace(block.text, "")
    return content


def inline(document: Path) -> list[str]:
    return INLINE.findall(prose(document))


def dmoe_commands(document: Path) -> Iterator[tuple[str, list[str], int]]:
    """Place, arguments and number of ranks of every `dmoe ...` in a shell block or between backticks, whoever starts it."""
    quoted = [
        (document.name, shlex.split(code)) for code in inline(document) if code.startswith("dmoe ")
    ]
    for place, words in [*command_lines(document), *quoted]:
        if "dmoe" not in words:
            continue
        at = len(words) - 1 - words[::-1].index("dmoe")
        if (
            at == 0 or words[at - 1] == "-m" or words[at - 1].startswith("dmoe:")
        ):  # alone, of a launcher, in a container
            launched = [int(after) for word, after in pairwise(words) if word == "--nproc-per-node"]
            yield place, words[at + 1 :], launched[0] if launched else 1


def parsed(arguments: list[str]) -> Any:
    """The context of a subcommand, parsed and not invoked; raises UsageError for what does not exist."""
    group = typer.main.get_command(app)
    name, *rest = arguments
    command = group.commands.get(name)  # type: ignore[attr-defined]
    assert command is not None, f"there is no command {name}"
    return command.make_context(name, list(rest))


@pytest.mark.parametrize(("block", "shown"), EXAMPLES, ids=[str(block) for block, _ in EXAMPLES])
def test_each_example_prints_what_is_shown(
    block: Block, shown: Block | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is meant to be otherwise: `python -m tests.docs.snippets` writes the new output."""
    monkeypatch.chdir(ROOT)
    printed = run(block)
    assert shown is None or printed == shown.text


def test_there_are_examples() -> None:
    assert len(EXAMPLES) > 8
    assert sum(shown is not None for _, shown in EXAMPLES) > 8


@by_name
def test_each_command_exists_with_its_options_and_its_config(
    document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for place, arguments, ranks in dmoe_commands(document):
        given = [word for word in arguments if word not in PLACEHOLDERS]
        if len(given) == 1:  # the command is only named
            given += NEEDED.get(given[0], [])
        context = parsed(given)
        if given[0] in WITH_CONFIG and OF_THE_READER.isdisjoint(given):
            config, _ = load_arguments(context.params["arguments"] or [])
            world = context.params.get("ranks") or context.params.get("world") or ranks
            if given[0] == "verify" or (given[0] == "explain" and not context.params.get("world")):
                world = config.parallel.ep if isinstance(config.parallel.ep, int) else 1
            try:
                check(config, world)
            except ValueError as error:
                pytest.fail(f"{place}: dmoe {' '.join(arguments)}: {error}")


def test_a_command_that_does_not_exist_is_seen() -> None:
    with pytest.raises(AssertionError, match="no command"):
        parsed(["trian"])
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parsed(["train", "--rank", "2"])


@by_name
def test_each_file_that_is_named_exists(document: Path) -> None:
    """Links, paths between backticks, and paths in commands."""
    for target in LINK.findall(prose(document)):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    words = [
        *inline(document),
        *(word for _, command in command_lines(document) for word in command),
    ]
    for word in words:
        if REPOSITORY_PATH.fullmatch(word):
            assert (ROOT / word).exists(), f"{document.name} names {word}"


def test_the_tree_of_the_readme_is_the_repository() -> None:
    first = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    rows = [path for cell in first for path in re.findall("`([^`]+)`", cell)]
    packages = {
        f"dmoe/{path.name}/"
        for path in (ROOT / "dmoe").iterdir()
        if (path / "__init__.py").is_file()
    }
    folders = {"examples/", "configs/", "launch/", "docker/", "benchmarks/", "tests/", "docs/"}
    assert packages | folders <= set(rows), (
        f"not in the table: {sorted((packages | folders) - set(rows))}"
    )
    for row in rows:
        assert (ROOT / row).exists(), f"README.md names {row}"


@by_name
def test_each_config_field_exists(document: Path) -> None:
    fields = {field.name for field in list_fields()}
    known = fields | {field.section for field in list_fields()}
    for code in inline(document):
        match = FIELD.fullmatch(code)
        if match is not None:
            assert match[1] in known, (
                f"{document.name} names {match[1]}, which is no field of the config"
            )


def test_every_public_name_has_an_example() -> None:
    """On one page: in its table, and in an example that is run."""
    page = ROOT / "docs" / "api.md"
    table = {
        name
        for row in re.findall(r"^\| (.+?) \|", prose(page), re.M)
        for name in INLINE.findall(row)
    }
    examples = "\n".join(block.text for block, _ in snippets(page))
    for name in dmoe.__all__:
        assert name in table, f"{name} is not in the table of docs/api.md"
        assert re.search(rf"\bdmoe\.{name}\b", examples), name


def test_the_readme_has_the_two_commands() -> None:
    content = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt -e . && dmoe train --ranks 2\n" in content
    assert "pip install -c constraints.txt -e '.[test]' && pytest\n" in content


def test_every_bug_that_verify_finds_is_listed() -> None:
    from tests.verify.bugs import BUGS

    rows = re.findall(
        r"^\| (\d+) \|.*\| ([^|]+) \|$",
        (ROOT / "docs" / "verify.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert dict(rows) == {name.split()[0]: quantity for name, (_, _, quantity, _) in BUGS.items()}


def test_every_row_of_the_report_is_explained() -> None:
    from dmoe.verify.differences import QUANTITIES

    content = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    table = content.split("## How to read the table")[1].split("## ")[0]
    assert tuple(re.findall(r"^\| ([A-Za-z][^|]*?) \| (?:1e-10|exact)", table, re.M)) == QUANTITIES


def test_every_router_kind_is_described() -> None:
    from dmoe.config.router_kinds import ROUTERS

    content = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    for kind in ROUTERS:
        assert f"| `{kind}` |" in content, kind


@by_name
def test_every_figure_is_filled_in(document: Path) -> None:
    assert "<<FIGURE" not in document.read_text(encoding="utf-8"), "a figure waits to be measured"
