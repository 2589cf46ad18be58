"""Keep the notes of transformers from the terminal, where they would hide dmoe's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Let transformers print and warn nothing; its errors are raised."""
    import transformers

    log: Any = transformers.logging
    level, shows_progress = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if shows_progress:
            log.enable_progress_bar()
