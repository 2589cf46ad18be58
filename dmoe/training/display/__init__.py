"""What a person sees of a run: a panel on a terminal, plain lines in a pipe, next to nothing with `--quiet`.

Used by the run itself and, without torch, by `dmoe watch`.
"""

from dmoe.training.display.base import Display
from dmoe.training.display.choice import open_display

__all__ = ["Display", "open_display"]
