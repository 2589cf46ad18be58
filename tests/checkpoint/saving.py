"""What the tests of the saver share: a small state, patches that reach into a rank, and waiting that ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint import AsyncSaver, list_steps, load
from dmoe.config.errors import CheckpointError


def state_of(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), float(value))}


def value_at(path: Path) -> float:
    state = state_of(-1.0)
    load(path, state)
    assert state["w"].unique().numel() == 1
    return float(state["w"][0])


def steps_of(root: Path) -> list[int]:
    return [step for step, _ in list_steps(root)]


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """monkeypatch, for functions that run in a rank's process."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def after(event: threading.Event, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        assert event.wait(30)
        return function(*args, **kwargs)

    return call


def full(*args: object) -> None:
    """In place of a call that writes."""
    raise OSError(28, "No space left on device")


def until_failed(saver: AsyncSaver) -> None:
    deadline = time.monotonic() + 30
    while not saver.failed:
        assert time.monotonic() < deadline, "the background error was lost"
        time.sleep(0.01)
