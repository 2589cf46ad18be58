"""A call that nobody waits for longer than so many seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable


def bounded(do: Callable[[], str | None], seconds: float, late: str) -> str | None:
    """What `do` gives, or `late` after so many seconds: it goes on in a thread that ends with the process.

    For what has no time-out of its own, or has several that add up. `do` must not raise: that would be `late` too.
    """
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(do()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else late
