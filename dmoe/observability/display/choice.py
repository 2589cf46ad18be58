"""Which display a process gets."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from rich.console import Console

from dmoe.observability.display.bars import charset_for
from dmoe.observability.display.live import Live
from dmoe.observability.display.plain import Display, Plain, Quiet, Silent
from dmoe.observability.display.state import DisplayState


def open_display(steps: int, start: int, speaks: bool, quiet: bool = False) -> Display:
    """The display of a process that trains to `steps` from `start`: silent on all ranks but the main one."""
    if not speaks:
        return Silent()
    return Quiet() if quiet else display_of(DisplayState(steps, start), time.monotonic)


def display_of(state: DisplayState, clock: Callable[[], float | None]) -> Live | Plain:
    """A panel if stdout is a terminal that can move its cursor, else plain lines.

    `isatty` decides, and not rich, which draws into files where FORCE_COLOR is set, as it often is in CI.
    """
    console = Console(highlight=False, emoji=False, markup=False)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return Plain(state, clock)
    return Live(console, state, charset_for(sys.stdout.encoding, os.environ), clock)
