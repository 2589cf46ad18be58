"""`dmoe verify` passes on correct code and names the right quantity for fifteen known bugs."""

from __future__ import annotations

import pytest

from dmoe.config.load import load
from dmoe.verify.cases import plan_cases, prepare, shrink
from dmoe.verify.verify import Report, verify
from tests.verify.bugs import BUGS

SHORT = ["model.layers=1", "moe.num_experts=4"]


def lines(report: Report) -> str:
    """Describe the quantities that differ."""
    return "\n".join(
        f"{row.quantity}: {row.size:.2e} in {row.case}: {row.where} ({row.cause})"
        for row in report.rows
        if not row.ok
    )


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_found_with_its_cause(name: str) -> None:
    patch, settings, quantity, phrase = BUGS[name]
    report = verify(load(None, [*SHORT, *settings]), worlds=[2], patch=patch)
    assert not report.ok, "not found"
    assert report.first is not None
    assert report.first.quantity == quantity, lines(report)
    assert phrase in report.first.cause, report.first.cause


def test_correct_code_passes() -> None:
    report = verify(
        load(None, [*SHORT, "moe.capacity.factor=1.0", "moe.balance.bias=0.01"]), worlds=[1, 2]
    )
    assert report.ok, lines(report)
    sizes = {row.quantity: row.size for row in report.rows}
    assert 0 < sizes["expert gradients"] < 1e-10, "compared with itself?"


def test_float32() -> None:
    report = verify(load(None, [*SHORT, "moe.capacity.factor=1.25"]), worlds=[2], dtype="float32")
    assert report.ok, lines(report)
    assert max(row.size for row in report.rows) > 1e-10, "that was float64"


def test_the_plan_covers_every_world_ep_exchange_and_mode() -> None:
    config = prepare(shrink(load(None, ["moe.capacity.factor=1.25"])), 4)
    cases = plan_cases(config, [1, 2, 4], 4).cases
    assert {(case.world, case.ep) for case in cases} == {
        (1, 1),
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
        (4, 4),
    }
    assert {(case.exchange, case.mode) for case in cases if case.world > 1} == {
        ("packed", "ddp"), ("packed", "fsdp"), ("padded", "ddp"), ("padded", "fsdp"),
    }  # fmt: skip
    assert sum(case.recompute for case in cases) == 1
    assert all(case.world * case.virtual_ranks == 4 for case in cases)


def test_refused_cases_have_a_reason() -> None:
    refused = plan_cases(prepare(shrink(load()), 4), [1, 2], 4).refused
    assert "no fixed number of slots" in refused["padded"]
