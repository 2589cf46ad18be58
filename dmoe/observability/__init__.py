"""Observability: run logger, terminal displays, trackers, alerts, profiler.

Nothing here may stop or delay a run for long. So this module has the one call with a time limit.
"""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable


def run_with_timeout(
    action: Callable[[], str | None], seconds: float, late: str | None = None
) -> str | None:
    """Run `action` in a thread and wait for it at most `seconds`.

    For actions without a time limit of their own, or with several that add up. An action that is
    late goes on in its daemon thread, which ends with the process.

    Args:
        action: returns None on success, else the reason of the failure; may raise.
        seconds: time limit.
        late: reason to return if the limit is passed.

    Returns:
        None on success, else one line with the reason.
    """
    results: list[str | None] = []

    def run() -> None:
        try:
            results.append(action())
        # Any exception is the reason of a failure; it must not end in the thread unseen.
        except Exception as error:
            results.append(error_text(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else late or f"it takes more than {seconds:g} seconds"


def error_text(error: Exception) -> str:
    """Return the message of `error` on one line of at most 200 characters, else its type."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def escape_controls(text: str) -> str:
    r"""Escape control characters but line breaks and tabs, e.g. `\x1b`.

    A model in its first steps generates any byte, and a terminal obeys some of them.
    """
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) != "Cc"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
