"""Numbers as a person reads them."""

from __future__ import annotations

import time

__all__ = ["clock", "count", "duration", "flops", "many", "percent", "plain", "size_of"]

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
        return MISSING if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return MISSING


def count(amount: int, thing: str) -> str:
    """`1 rank`, `1,024 ranks`."""
    return f"{amount:,} {thing}{'' if amount == 1 else 's'}"
