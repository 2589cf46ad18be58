"""Numbers, sizes, durations and tables as plain text: the one formatter of reports and terminals.

Tables have no box characters and no colour, so their columns line up in a terminal, in a pipe and
in a mail.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

NOT_RECORDED = "not recorded"
COLUMN_GAP = 2
BYTES_PER_NUMBER = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per number by precision."""


def format_number(value: float | None, digits: int = 4) -> str:
    """Return an integer with thousands separators, any other number with `digits` digits."""
    if value is None:
        return NOT_RECORDED
    is_integer = value == int(value) and abs(value) < 1e15
    return f"{value:,.0f}" if is_integer else f"{value:,.{digits}g}"


def format_percent(value: float | None) -> str:
    """Return a share between 0 and 1 in percent: `12.5%`."""
    return NOT_RECORDED if value is None else f"{100 * value:.3g}%"


def format_count(value: float | None) -> str:
    """Return a large count with three digits: `1.23 M`, `46.7 B`."""
    return NOT_RECORDED if value is None else _scale(value, ("", "k", "M", "B", "T"))


def format_flops(value: float | None, unit: str = "") -> str:
    """Return floating-point operations with SI prefixes: `29.3 k`, `26.3 GFLOP`, `2.1 P`."""
    return (
        NOT_RECORDED if value is None else _scale(value, ("", "k", "M", "G", "T", "P", "E"), unit)
    )


def format_bytes(value: float | None) -> str:
    """Return a size in decimal units, as disks and networks are sold: `3.1 MB`."""
    if value is None:
        return NOT_RECORDED
    return f"{value:.0f} B" if value < 999.5 else _scale(value, ("", "k", "M", "G", "T"), "B")


def _scale(value: float, prefixes: Sequence[str], unit: str = "") -> str:
    *smaller, largest = prefixes
    for prefix in smaller:
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:,.4g} {largest}{unit}"


def format_duration(seconds: float | None) -> str:
    """Return a duration: `1 h 02 min`, `3 min 20 s`, `4.2 s`."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def format_utc(seconds: float | None) -> str:
    """Return a Unix time as date and time in UTC: reports are read in other time zones."""
    if seconds is None:
        return NOT_RECORDED
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return NOT_RECORDED


def format_optional(value: float | None, template: str) -> str | None:
    """Return `template.format(value)`, or None if there is no value."""
    return None if value is None else template.format(value)


def format_ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers with consecutive runs folded: `0-3, 8, 10-11`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def plural(amount: int, noun: str) -> str:
    """Return the amount and the noun in its number: `1 rank`, `1,024 ranks`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def single_line(text: str) -> str:
    """Return `text` without line breaks and control characters: names come from outside."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, indent: int = 0
) -> list[str]:
    """Lay out a table; the first column is left-aligned, the others are right-aligned.

    Columns that do not fit follow in a second table below an empty line, which repeats the first
    column. The first column, and a single other column, are never cut.

    Args:
        head: title per column. Titles may have several lines and are aligned at the bottom.
        rows: cells per row, as many as titles.
        width: largest number of characters per line, indent included.
        indent: spaces before each line.

    Returns:
        The lines, without trailing spaces.
    """
    titles = [title.split("\n") for title in head]
    height = max(map(len, titles))
    padded = [[""] * (height - len(title)) + title for title in titles]
    cells = [
        *([title[line] for title in padded] for line in range(height)),
        *([single_line(cell) for cell in row] for row in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines: list[str] = []
    for columns in _split_columns(widths, width - indent):
        if lines:
            lines.append("")
        for row in cells:
            first, *rest = columns
            aligned = [row[first].ljust(widths[first])]
            aligned += [row[column].rjust(widths[column]) for column in rest]
            lines.append(" " * indent + (" " * COLUMN_GAP).join(aligned).rstrip())
    return lines


def _split_columns(widths: Sequence[int], width: int) -> Iterator[list[int]]:
    """Yield the columns of each partial table; the first column is in all of them."""
    part, used = [0], widths[0]
    for column in range(1, len(widths)):
        if len(part) > 1 and used + COLUMN_GAP + widths[column] > width:
            yield part
            part, used = [0], widths[0]
        part.append(column)
        used += COLUMN_GAP + widths[column]
    yield part
