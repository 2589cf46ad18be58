"""The fenced blocks of the documentation: found, run, and (on request) their output written back.

python -m tests.docs.snippets        # after a change of an example: writes what it prints into the text block behind it
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

__all__ = ["DOCUMENTS", "ROOT", "Block", "blocks", "command_lines", "run", "snippets"]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SHELL = ("console", "bash")


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    text: str
    start: int
    """Offset of the text in the document."""

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    content = document.read_text(encoding="utf-8")
    return [
        Block(
            document, content.count("\n", 0, match.start()) + 1, match[1], match[2], match.start(2)
        )
        for match in FENCE.finditer(content)
    ]


def snippets(document: Path) -> Iterator[tuple[Block, Block | None]]:
    """Each python block, and the text block that follows it with nothing but blank lines between: what it prints."""
    content, found = document.read_text(encoding="utf-8"), blocks(document)
    for block, after in pairwise([*found, None]):
        assert block is not None
        if block.language == "python":
            end = block.start + len(block.text)
            shown = (
                after is not None
                and after.language == "text"
                and re.fullmatch(r"```\s+```text\n", content[end : after.start])
            )
            yield block, (after if shown else None)


def run(block: Block) -> str:
    """What the block prints, in a namespace of its own."""
    printed = io.StringIO()
    code = compile(block.text, str(block), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def command_lines(document: Path) -> Iterator[tuple[str, list[str]]]:
    """`FILE:LINE` and the words of every command in a shell block; of console blocks only what stands behind a `$`."""
    for block in blocks(document):
        if block.language not in SHELL:
            continue
        lines = block.text.replace("\\\n", " ").splitlines()
        if block.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            words = shlex.split(line, comments=True)
            while "&&" in words:
                cut = words.index("&&")
                yield str(block), words[:cut]
                words = words[cut + 1 :]
            if words:
                yield str(block), words


def write_back(document: Path) -> None:
    content = document.read_text(encoding="utf-8")
    for block, shown in reversed(list(snippets(document))):
        if shown is not None:
            content = content[: shown.start] + run(block) + content[shown.start + len(shown.text) :]
    document.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    for path in DOCUMENTS:
        write_back(path)
