"""The table of docs/models.md: every family against plain transformers in one process.

python -m tests.hf.table        measure all families and write the table
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dmoe
from dmoe.config.schema import CapacityConfig
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.full_tensors import gather_full
from dmoe.hf import forward_of
from dmoe.verify.published import float32_is_float64
from tests.hf.families import FAMILIES, tiny
from tests.ranks import run_ranks

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- families: python -m tests.hf.table -->", "<!-- end of families -->"
BATCH, LENGTH = 4, 16


@dataclass
class Row:
    """Largest absolute differences of one family from plain transformers, in float64."""

    family: str
    score: str
    logits_1: float
    loss_1: float
    gradients_1: float
    logits_2: float
    loss_2: float
    gradients_2: float
    drops_1: int
    """Dropped assignments at capacity factor 0.75, and EP = 1."""
    drops_2: int

    @property
    def largest(self) -> float:
        """The largest difference of any quantity."""
        values = (getattr(self, field.name) for field in fields(self))
        return max(value for value in values if isinstance(value, float))

    def line(self) -> str:
        """Return the row of the table."""
        cells = [self.family, self.score]
        for name in ("logits_1", "loss_1", "gradients_1", "logits_2", "loss_2", "gradients_2"):
            value = getattr(self, name)
            cells.append(f"{value:.0e}" if value else "0")
        return f"| {' | '.join([*cells, f'{self.drops_1} / {self.drops_2}'])} |"


HEADER = (
    "| family (`model_type`) | score | logits, EP 1 | loss | gradients | logits, EP 2 | loss | "
    "gradients | drops, EP 1 / 2 |\n|---|---|---|---|---|---|---|---|---|"
)


def batch() -> Tensor:
    return torch.randint(3, 97, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def forward_and_backward(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and loss after a backward."""
    with float32_is_float64():
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
    return output.logits.detach(), output.loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of the gradients; a missing one counts as zeros."""
    assert actual.keys() <= expected.keys()
    return max(
        float((actual.get(name, torch.zeros_like(value)) - value).abs().max())
        for name, value in expected.items()
    )


def dropped(model: nn.Module) -> int:
    """Return the dropped assignments of the latest forward."""
    return sum(
        int((layer.stats.choice_E - layer.stats.kept_E).sum()) for layer in forward_of(model).layers
    )


LIMITED = CapacityConfig(factor=0.75, eval_factor=0.75, group="sequence")


def measure(rank: int, world: int, families: list[str]) -> list[Row]:
    """Compare on this rank; loss and drops of both ranks are summed."""
    import torch.distributed as dist

    rows = []
    for family in families:
        ids = batch()
        plain = tiny(family)
        logits, loss = forward_and_backward(plain, ids)
        expected = gradients(plain)
        one = dmoe.moefy(tiny(family))
        # a process group exists: dmoe.parallelize tells the layers that they are alone
        own_logits, own_loss = _alone(one, ids)
        row = Row(family, _score(one), *[0.0] * 6, 0, 0)
        row.logits_1 = float((own_logits - logits).abs().max())
        row.loss_1 = float((own_loss - loss).abs())
        row.gradients_1 = largest_difference(gradients(one), expected)
        model = dmoe.parallelize(dmoe.moefy(tiny(family)), ep=world)
        part = ids.chunk(world)[rank]
        logits_2, loss_2 = forward_and_backward(model, part)
        row.logits_2 = float((logits_2 - logits.chunk(world)[rank]).abs().max())
        dist.all_reduce(loss_2)
        row.loss_2 = float((loss_2 / world - loss).abs())
        experts = set(expert_parameters(model.module))
        full = gather_full(gradients(model.module), experts, model.mesh)
        row.gradients_2 = largest_difference(full, expected)
        row.drops_1, row.drops_2 = _drops(family, rank, world, ids)
        rows.append(row)
    return rows


def _alone(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model of one process inside a rank: every rank computes the whole batch."""
    from unittest.mock import patch

    with patch("dmoe.hf.layer.check_parallel"):
        return forward_and_backward(model, ids)


def _drops(family: str, rank: int, world: int, ids: Tensor) -> tuple[int, int]:
    """Return the dropped assignments of the whole batch at EP = 1 and on all ranks."""
    import torch.distributed as dist

    one = dmoe.moefy(tiny(family), LIMITED)
    with torch.no_grad():
        one(input_ids=ids, use_cache=False)
        model = dmoe.parallelize(dmoe.moefy(tiny(family), LIMITED), ep=world)
        model(input_ids=ids.chunk(world)[rank], use_cache=False)
    total = torch.tensor(dropped(model))
    dist.all_reduce(total)
    return dropped(one), int(total)


def _score(model: nn.Module) -> str:
    from dmoe.hf import moefied_layers

    return moefied_layers(model)[0].facts.score_name


def measure_all(families: list[str]) -> list[Row]:
    """Measure on two ranks and return the worse of both."""
    first, second = run_ranks(2, measure, families, timeout=400)
    rows = []
    for a, b in zip(first, second, strict=True):
        worse = {
            field.name: max(getattr(a, field.name), getattr(b, field.name)) for field in fields(Row)
        }
        rows.append(Row(**worse))
    return rows


def written_families() -> list[str]:
    """Return the families of the table in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index(START) : text.index(END)]
    return [line.split("|")[1].strip() for line in table.splitlines()[3:] if line.startswith("|")]


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = "\n".join(row.line() for row in measure_all(list(FAMILIES)))
    before, after = text[: text.index(START)], text[text.index(END) :]
    DOCUMENT.write_text(f"{before}{START}\n{HEADER}\n{lines}\n{after}", encoding="utf-8")
