"""`dmoe verify` covers the mask of documents: green as it is, red where it leaks or is shifted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe.config.load import load
from dmoe.data import synthetic
from dmoe.models import transformer
from dmoe.verify.causes import Report
from dmoe.verify.verify import Patch, verify

pytestmark = pytest.mark.ranks


def run(patch: Patch | None = None, worlds: tuple[int, ...] = (1,)) -> Report:
    settings = ["model.layers=2", "moe.num_experts=4", "data.document_mask=true"]
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


def test_documents_pass_on_two_ranks() -> None:
    report = run(worlds=(2,))
    assert report.ok, report.first
    sizes = {row.quantity: row.size for row in report.rows}
    assert 0 < sizes["dense gradients"] < 1e-10, "compared with itself?"


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
