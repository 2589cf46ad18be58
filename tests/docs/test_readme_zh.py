"""README.zh.md is kept in step with README.md: its sections, its commands, its figures."""

from __future__ import annotations

import re

from tests.docs.snippets import ROOT, blocks

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"


def headings(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^(#+) (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)


def test_each_section_is_there_with_its_english_name() -> None:
    english = headings(ENGLISH.read_text(encoding="utf-8"))
    chinese = headings(CHINESE.read_text(encoding="utf-8"))
    assert [level for level, _ in chinese] == [level for level, _ in english]
    assert len(english) > 10
    for (_, name), (_, translated) in zip(english[1:], chinese[1:], strict=True):
        assert translated[:-1].endswith(name), translated  # in parentheses


def test_commands_code_and_output_are_the_same() -> None:
    english = [(block.language, block.text) for block in blocks(ENGLISH)]
    assert [(block.language, block.text) for block in blocks(CHINESE)] == english
    assert len(english) > 8


def test_the_figures_of_the_runs_are_the_same() -> None:
    pattern = r"^\|[^|]+(\| [\d.]+ \| \d+ \| [\d,]+ \| `dmoe train.*)$"
    found = re.findall(pattern, CHINESE.read_text(encoding="utf-8"), re.M)
    assert found == re.findall(pattern, ENGLISH.read_text(encoding="utf-8"), re.M)
    assert len(found) == 6


def test_the_picture_of_the_token_is_the_same() -> None:
    for line in ENGLISH.read_text(encoding="utf-8").split("## The proof")[0].splitlines():
        if line.startswith("    "):
            assert line in CHINESE.read_text(encoding="utf-8"), line


def test_each_file_that_is_linked_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)", CHINESE.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
