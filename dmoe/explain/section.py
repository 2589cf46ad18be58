"""One topic of an explanation: sentences for a person, and the numbers in them for a program. And how numbers are spelled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    words: list[str]
    """Each a sentence or two."""
    numbers: dict[str, Any]
    """Plain JSON."""


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 8, 10-11`: ascending numbers with their runs folded."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def size_of(size: float) -> str:
    """Bytes in decimal units, as disks and networks are sold: `3.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def many(value: float, units: str = " kMBT") -> str:
    """A large count: `1.23 M`, `46.7 B`."""
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}".rstrip()
        value /= 1000
    return f"{value:,.4g} {units[-1]}"


def flop(value: float) -> str:
    """`26.3 GFLOP`."""
    return f"{many(value, ' kMGTPE')}FLOP"


def count(number: int, thing: str) -> str:
    """`1 rank`, `1,024 ranks`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
