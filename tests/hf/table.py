"""The tables of docs/models.md: every family against plain transformers and peft in one process.

python -m tests.hf.table        measure all families and write the tables
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.full_tensors import gather_full
from dmoe.hf import forward_of
from dmoe.verify.published import float32_is_float64
from tests.hf.families import FAMILIES, tiny
from tests.ranks import run_ranks

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
FILES_START, FILES_END = "<!-- files: python -m tests.hf.table -->", "<!-- end of files -->"
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


@dataclass
class FilesRow:
    """A family's way through files: import -> export, and LoRA to peft and back, in float64."""

    family: str
    tensors: int
    """In the published files."""
    different: int
    """Of those, not the same bytes after import and export."""
    peft: float | None
    """Largest difference of the logits of peft's model with the saved factors; None: refused."""
    back: float | None
    """The same, saved by peft and loaded here again."""
    merged: float | None
    """The same, with the factors merged into the weights."""

    def line(self) -> str:
        """Return the row of the table."""
        values = (self.peft, self.back, self.merged)
        cells = ["refused" if v is None else f"{v:.0e}" if v else "0" for v in values]
        return f"| {self.family} | {self.different} of {self.tensors} | {' | '.join(cells)} |"


FILES_HEADER = (
    "| family (`model_type`) | tensors that differ after import -> export | LoRA of the experts: "
    "logits in peft | saved by peft, loaded here | merged |\n|---|---|---|---|---|"
)
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
    """Return the largest difference of the gradients; missing ones and rows count as zeros."""
    assert actual.keys() <= expected.keys()
    largest = 0.0
    for name, value in expected.items():
        found = torch.zeros_like(value)
        if name in actual:
            found[: len(actual[name])] = actual[name]  # LongCat's identities have unread rows
        largest = max(largest, float((found - value).abs().max()))
    return largest


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
    with torch.no_grad(), float32_is_float64():
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


def measure_files(family: str, folder: Path) -> FilesRow:
    """Measure one family in one process; `folder` is empty."""
    from dmoe.hf.export import export_checkpoint
    from dmoe.hf.lora import add_lora, lora_places, merge_lora
    from dmoe.hf.lora_peft import load_lora, save_lora
    from tests.hf.test_export import make_checkpoint, make_source, weights
    from tests.hf.test_lora import peft_model

    source = make_source(family, folder / "source", dtype=torch.bfloat16, vocab_size=259)
    export_checkpoint(make_checkpoint(source, folder / "run"), source, folder / "out")
    ours, theirs = weights(folder / "out"), weights(source)
    assert ours.keys() == theirs.keys()
    same = [torch.equal(ours[n].view(torch.uint8), v.view(torch.uint8)) for n, v in theirs.items()]
    model = dmoe.moefy(tiny(family))
    try:
        add_lora(model, 4, 6.0, ("experts",))
    except ConfigError:
        return FilesRow(family, len(same), same.count(False), None, None, None)
    generator = torch.Generator().manual_seed(7)
    for place in lora_places(model):
        b = getattr(place.module, place.b)
        b.data.copy_(0.1 * torch.randn(b.shape, generator=generator, dtype=b.dtype))
    logits = _logits(model)
    save_lora(model, folder / "lora")
    in_peft = peft_model(family, folder / "lora").eval()  # as the others: Phi's router samples
    peft = float((_logits(in_peft) - logits).abs().max())
    in_peft.save_pretrained(folder / "peft")
    again = load_lora(dmoe.moefy(tiny(family)), folder / "peft")
    back = float((_logits(again) - logits).abs().max())
    merged = float((_logits(merge_lora(model)) - logits).abs().max())
    return FilesRow(family, len(same), same.count(False), peft, back, merged)


def _logits(model: Any) -> Tensor:
    with torch.no_grad(), float32_is_float64():
        logits: Tensor = model(input_ids=batch(), use_cache=False).logits
    return logits


def written_rows(start: str = START, end: str = END) -> dict[str, list[str]]:
    """Return the other cells of each family in a table of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index(start) : text.index(end)].splitlines()[3:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    return {family: cells for family, *cells in rows}


def write(start: str, end: str, header: str, rows: list[str]) -> None:
    """Replace the table between two marks of the document."""
    text, lines = DOCUMENT.read_text(encoding="utf-8"), "\n".join(rows)
    before, after = text[: text.index(start)], text[text.index(end) :]
    DOCUMENT.write_text(f"{before}{start}\n{header}\n{lines}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    write(START, END, HEADER, [row.line() for row in measure_all(list(FAMILIES))])
    found = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as place:
            found.append(measure_files(name, Path(place)).line())
    write(FILES_START, FILES_END, FILES_HEADER, found)
