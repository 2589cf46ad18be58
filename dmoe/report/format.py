"""Numbers as a person reads them.

Tables of plain text: columns that line up in a terminal, in a pipe and in a mail. No box characters, no colour.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

MISSING = "not recorded"


def plain(value: float | None, digits: int = 4) -> str:
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:,.{digits}g}"


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.3g}%"


def many(value: float | None, unit: str = "") -> str:
    """A large count: `1.23 M`, `46.7 B`."""
    if value is None:
        return MISSING
    for suffix in ("", "k", "M", "B"):
        if abs(value) < 999.5:
            return f"{value:.3g} {suffix}{unit}".strip()
        value /= 1000
    return f"{value:,.4g} T{unit}"


def flops(value: float | None) -> str:
    """Floating-point operations in the prefixes that hardware is sold by: `29.3 k`, `1.44 G`, `2.1 P`."""
    if value is None:
        return MISSING
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}".strip()
        value /= 1000
    return f"{value:,.4g} E"


def size_of(value: float | None) -> str:
    """Bytes in decimal units, as disks and networks are sold: `3.1 MB`."""
    if value is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.4g} TB"


def duration(seconds: float | None) -> str:
    """`1 h 02 min`, `3 min 20 s`, `4.2 s`."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def clock(seconds: float | None) -> str:
    """A time of day in UTC: a report is read in another time zone than it was written in."""
    try:
        return (
            MISSING if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
        )
    except (OverflowError, ValueError, OSError):
        return MISSING


def count(amount: int, thing: str) -> str:
    """`1 rank`, `1,024 ranks`."""
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"


GAP = 2


def table_lines(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, indent: int = 0
) -> list[str]:
    """`head` over `rows`, the first column to the left, the others to the right; a title of several lines stands on the last.

    Columns that do not fit in `width` go on in a second table below an empty line, with the first column repeated. The first column
    itself, and a single other one, is never cut.
    """
    titles = [title.split("\n") for title in head]
    high = max(map(len, titles))
    above = [
        [([""] * (high - len(title)) + title)[line] for title in titles] for line in range(high)
    ]
    grid = [*above, *([one_line(cell) for cell in row] for row in rows)]
    wide = [max(len(row[column]) for row in grid) for column in range(len(head))]
    lines: list[str] = []
    for part in _parts(wide, width - indent):
        lines += [""] * bool(lines)
        lines += [
            " " * indent
            + _line([row[column] for column in part], [wide[column] for column in part])
            for row in grid
        ]
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
