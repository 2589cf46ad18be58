"""Labels: the names of domains and classes, which are printed, and are keys of metrics."""

from __future__ import annotations

import re
from typing import Any

# A line break would end a line of the terminal, and half of a surrogate pair cannot be printed.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def label_of(value: Any) -> str | None:
    """Return the label that a value of a record is: a string or a number, as text.

    None for anything else: null, an empty string, NaN, an object, a text with control characters or
    with half of a surrogate pair.
    """
    if not isinstance(value, str | int | float) or value != value:
        return None
    text = str(value)
    return text if text and not _UNPRINTABLE.search(text) else None
