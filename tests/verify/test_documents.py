"""`dmoe verify` covers documents, answers and padding: green as they are, red where they leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.config.load import load
from dmoe.data import synthetic
from dmoe.models import transformer
from dmoe.train import step
from dmoe.verify.causes import Report
from dmoe.verify.verify import Patch, verify

pytestmark = pytest.mark.ranks


def run(
    patch: Patch | None = None, worlds: tuple[int, ...] = (1,), data: str = "document_mask=true"
) -> Report:
    settings = ["model.layers=2", "moe.num_experts=4", f"data.{data}"]
    return verify(load(None, settings), worlds=worlds, patch=patch)


def leaking() -> None:
    """Let every token see all earlier ones of its sequence, as without a mask."""

    def all_earlier(position_BS: Tensor) -> Tensor:
        sequences, length = position_BS.shape
        return torch.ones(sequences, length, length, dtype=torch.bool).tril()

    transformer.visible_in_document = all_earlier  # type: ignore[attr-defined]


def leaking_into_the_first_token() -> None:
    """Let the first token of a document see the one before it: off by one."""
    visible = transformer.visible_in_document  # type: ignore[attr-defined]
    transformer.visible_in_document = (  # type: ignore[attr-defined]
        lambda position_BS: visible((position_BS - 1).clamp(min=0).roll(1, 1))
    )


def not_restarting() -> None:
    """Count positions on through the documents of a sequence."""
    positions = synthetic.positions_after  # type: ignore[attr-defined]
    synthetic.positions_after = (  # type: ignore[attr-defined]
        lambda starts_BS: positions(starts_BS & False)
    )


def all_targets_counted() -> None:
    """Divide the loss by all targets, answers or not."""
    step._global_targets = lambda engine, batches, counts: engine.targets_per_step


def own_targets_counted() -> None:
    """Divide by the targets of this rank times the ranks: a mean of the ranks' means."""
    step._global_targets = lambda engine, batches, counts: (
        counts.targets * engine.process.world_size
    )


def padding_routed() -> None:
    """Leave padding in the MoE layers of training."""
    context = step.TokenContext

    def all_valid(*, valid_T: Tensor | None, **others: Any) -> Any:
        return context(valid_T=None if valid_T is None else valid_T | True, **others)

    step.TokenContext = all_valid  # type: ignore[assignment, misc]


@pytest.mark.parametrize("data", ["format=instruct", "document_mask=true"])
def test_passes_on_two_ranks(data: str) -> None:
    report = run(worlds=(2,), data=data)
    assert report.ok, report.first
    sizes = {row.quantity: row.size for row in report.rows}
    assert 0 < sizes["dense gradients"] < 1e-10, "compared with itself?"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "world", "quantity"),
    [
        (all_targets_counted, 1, "output gradients"),
        (own_targets_counted, 2, "output gradients"),
        (padding_routed, 1, "layer inputs"),
    ],
)
def test_broken_answers_are_red(patch: Patch, world: int, quantity: str) -> None:
    report = run(patch, (world,), "format=instruct")
    assert report.first is not None
    assert report.first.quantity == quantity, report.first


@pytest.mark.parametrize(
    ("patch", "quantity"),
    [
        (leaking_into_the_first_token, "layer inputs"),
        pytest.param(leaking, "layer inputs", marks=pytest.mark.slow),
        pytest.param(not_restarting, "samples", marks=pytest.mark.slow),
    ],
)
def test_a_broken_mask_is_red(patch: Patch, quantity: str) -> None:
    report = run(patch)
    assert report.first is not None
    assert report.first.quantity == quantity, report.first
