"""What a person sees of a run: a panel on a terminal, plain lines in a pipe, next to nothing with `--quiet`.

Used by the run itself and, without torch, by `dmoe watch`.
"""

from dmoe.observability.display.choice import open_display
from dmoe.observability.display.plain import Display

__all__ = ["Display", "open_display"]
