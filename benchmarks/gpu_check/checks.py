"""What a check is given, what it says, and how differences are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmoe.config.load import load
from dmoe.config.schema import Config

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Row:
    """One line: `ok` is None where nothing was checked, or nothing can be wrong."""

    check: str
    name: str
    got: str
    wanted: str
    ok: bool | None


@dataclass(frozen=True)
class Machine:
    device: str
    dry: bool
    folder: Path

    def size(self, full: int, dry: int) -> int:
        return dry if self.dry else full

    def config(self, *overrides: str, path: Path = QUICKSTART) -> Config:
        given = [f"train.device={self.device}", "data.source=synthetic:zipf"]
        small = ["model.dim=64", "model.layers=2", "moe.expert_dim=32", "data.seq_len=32"]
        return load(path, [*given, *(small if self.dry else []), *overrides])


Found = Iterator[tuple[str, object, str, bool | None]]
"""Name, got, wanted, ok."""


Check = Callable[[Machine], Found]


def limited(name: str, got: float, limit: float) -> tuple[str, object, str, bool | None]:
    return name, f"{got:.2g}", f"<= {limit:g}", bool(got <= limit)


def relative(value: Tensor, expected: Tensor) -> float:
    if not torch.isfinite(value).all():
        return math.inf
    return float(((value - expected).norm() / expected.norm().clamp(min=1e-30)).detach())


def apart(values: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite where there are not as many values."""
    if len(values) != len(expected) or not all(map(math.isfinite, values)):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))
