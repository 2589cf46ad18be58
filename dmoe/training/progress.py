"""What a person sees while it trains: a live line on a terminal, plain lines into a pipe."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Display", "open_display"]


class Display(Protocol):
    def step(self, step: int, values: dict[str, Any] | None) -> None:
        """`step` steps are done; `values` are the metrics, on the steps that have them."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None: ...


def open_display(steps: int, start: int, speaks: bool) -> Display:
    """The display for this process: silent on all ranks but the main one."""
    if not speaks:
        return Silent()
    console = Console(highlight=False, emoji=False)
    return Live(console, steps, start) if console.is_terminal else Plain(steps, start)


class Silent:
    def step(self, step: int, values: dict[str, Any] | None) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class Live:
    """One line that is redrawn: steps, time left, loss, bits per byte, tokens/s, drop rate, load max/mean."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        columns = (MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=console, refresh_per_second=4)
        self.task = self.progress.add_task("", total=steps, completed=start)
        self.progress.start()

    def step(self, step: int, values: dict[str, Any] | None) -> None:
        if values is None:
            self.progress.update(self.task, completed=step)
        else:
            self.progress.update(self.task, completed=step, description=_few_words(values))

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False)

    def close(self) -> None:
        self.progress.stop()


class Plain:
    def __init__(self, steps: int, start: int) -> None:
        self.steps, self.start, self.began = steps, start, time.monotonic()

    def step(self, step: int, values: dict[str, Any] | None) -> None:
        if values is not None:
            left = (time.monotonic() - self.began) / max(1, step - self.start) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {_words(values)}  left {int(left) // 60}:{int(left) % 60:02d}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None: ...


def _words(values: dict[str, Any]) -> str:
    return (
        f"loss {values['loss']:.3f}  bits/byte {values['bits_per_byte']:.3f}  {values['tokens_per_second']:,.0f} tokens/s  "
        f"dropped {values['drop_rate']:.1%}  load max/mean {values['load_max_over_mean']:.2f}"
    )


def _few_words(values: dict[str, Any]) -> str:
    return (
        f"loss {values['loss']:.3f} bpb {values['bits_per_byte']:.3f} {values['tokens_per_second']:,.0f} tok/s "
        f"drop {values['drop_rate']:.1%} load {values['load_max_over_mean']:.2f}"
    )
