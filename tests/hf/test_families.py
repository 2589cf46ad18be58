"""Every family of docs/models.md equals plain transformers, at EP = 1 and EP = 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hf.families import FAMILIES
from tests.hf.table import Row, measure_all, measure_files, written_families

TOLERANCE = 1e-13
"""In float64, with what transformers computes in float32 in float64 too."""


def check(row: Row) -> None:
    assert row.largest < TOLERANCE, row
    assert row.drops_1 == row.drops_2 > 0, row


def test_a_family_equals_transformers() -> None:
    """A sample of the ranks tier: clamps, biases and interleaved stacks; a bias of the choice."""
    for row in measure_all(["gpt_oss", "lfm2_moe"]):
        check(row)


@pytest.mark.ranks
def test_every_family_equals_transformers() -> None:
    rows = measure_all([family for family in FAMILIES if family not in ("gpt_oss", "lfm2_moe")])
    for row in rows:
        check(row)


def test_the_document_has_every_family() -> None:
    assert written_families() == list(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_lora_of_every_family(family: str, tmp_path: Path) -> None:
    """Import -> export gives the same bytes; peft computes the same with the factors, both ways."""
    row = measure_files(family, tmp_path)
    assert row.different == 0 < row.tensors, row
    found = [row.peft, row.back, row.merged]
    if family in ("llama4_text", "longcat_flash"):
        assert found == [None] * 3, "peft takes its stacks for others, so LoRA on them is refused"
    else:
        assert max(value for value in found if value is not None) < 1e-12, row
        assert None not in found, row
