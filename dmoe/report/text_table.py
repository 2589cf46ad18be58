"""Tables of plain text: columns that line up in a terminal, in a pipe and in a mail. No box characters, no colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["one_line", "table_lines"]

GAP = 2


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], width: int, indent: int = 0) -> list[str]:
    """`head` over `rows`, the first column to the left, the others to the right; a title of several lines stands on the last.

    Columns that do not fit in `width` go on in a second table below an empty line, with the first column repeated. The first column
    itself, and a single other one, is never cut.
    """
    titles = [title.split("\n") for title in head]
    high = max(map(len, titles))
    above = [[([""] * (high - len(title)) + title)[line] for title in titles] for line in range(high)]
    grid = [*above, *([one_line(cell) for cell in row] for row in rows)]
    wide = [max(len(row[column]) for row in grid) for column in range(len(head))]
    lines: list[str] = []
    for part in _parts(wide, width - indent):
        lines += [""] * bool(lines)
        lines += [" " * indent + _line([row[column] for column in part], [wide[column] for column in part]) for row in grid]
    return lines


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: names come from outside."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _parts(wide: Sequence[int], width: int) -> Iterator[list[int]]:
    """Columns that stand beside each other, the first one in each part."""
    part, used = [0], wide[0]
    for column in range(1, len(wide)):
        if len(part) > 1 and used + GAP + wide[column] > width:
            yield part
            part, used = [0], wide[0]
        part.append(column)
        used += GAP + wide[column]
    yield part


def _line(cells: Sequence[str], wide: Sequence[int]) -> str:
    rest = [cell.rjust(space) for cell, space in zip(cells[1:], wide[1:], strict=True)]
    return (" " * GAP).join([cells[0].ljust(wide[0]), *rest]).rstrip()
