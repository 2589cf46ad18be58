"""Helpers of the checkpoint tests: a small state, patches inside a rank, limited waiting."""

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


def constant_state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100,), float(value))}


def loaded_value(path: Path) -> float:
    state = constant_state(-1.0)
    load(path, state)
    assert state["w"].unique().numel() == 1
    return float(state["w"][0])


def saved_steps(root: Path) -> list[int]:
    return [step for step, _ in list_steps(root)]


def error_message(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Patch an attribute, like monkeypatch, for functions that run in a rank's process."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def call_after(event: threading.Event, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        assert event.wait(30)
        return function(*args, **kwargs)

    return call


def disk_full(*args: object) -> None:
    """Raise ENOSPC, in place of a call that writes."""
    raise OSError(28, "No space left on device")


def wait_until_failed(saver: AsyncSaver) -> None:
    deadline = time.monotonic() + 30
    while not saver.failed:
        assert time.monotonic() < deadline, "the background error was lost"
        time.sleep(0.01)
