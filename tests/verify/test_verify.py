"""`dmoe verify` passes on correct code and names the right quantity for thirty-two known bugs.

Two MoE layers: with one, a wrong output of the first layer could not show up as the second's
"dropped set", which is how the project's own bugs 11 and 12 looked on the quickstart.
"""

from __future__ import annotations

import pytest

import dmoe.verify.verify as verification
from dmoe.config.load import load
from dmoe.moe.experts import grouped_mlp
from dmoe.verify.cases import CasePlan, plan_cases, prepare, shrink
from dmoe.verify.causes import Report
from dmoe.verify.naive import layer as naive_layer
from dmoe.verify.verify import verify
from tests.verify.bugs import BUGS
from tests.verify.halves import half_of

pytestmark = pytest.mark.ranks

SHORT = ["model.layers=2", "moe.num_experts=4"]
IN_ALL_CASES = ("3 experts averaged", "15 counted twice", "25 ties to the higher id")
"""Bugs whose cause is named by a case of the other half, or by comparing both."""


def lines(report: Report) -> str:
    """Describe the quantities that differ."""
    return "\n".join(
        f"{row.quantity}: {row.size:.2e} in {row.case}: {row.where} ({row.cause})"
        for row in report.rows
        if not row.ok
    )


def half_of_the_plan(*arguments: object) -> CasePlan:
    return half_of(plan_cases(*arguments), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_found_with_its_cause(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, settings, quantity, phrase = BUGS[name]
    if name not in IN_ALL_CASES:
        monkeypatch.setattr(verification, "plan_cases", half_of_the_plan)
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


def test_experts_that_move_pass() -> None:
    """After every step, at EP 4 and 2, ddp and fsdp, with and without recompute."""
    report = verify(load(None, ["model.layers=2", "parallel.placement.kind=periodic"]), worlds=[4])
    assert report.ok, lines(report)
    assert any("EP=4" in case and "recompute" in case for case in report.cases)


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


def test_two_layers_drawn_from_one_key_are_seen() -> None:
    """Both sides draw alike, so only a comparison of the draws with each other can see it."""
    report = verify(load(None, SHORT), worlds=[1], setup=one_key_for_both_matrices)
    assert report.first is not None
    assert report.first.quantity == "initial draws", lines(report)
    assert "drawn like" in report.first.where


def one_key_for_both_matrices() -> None:
    normal = grouped_mlp.normal_
    grouped_mlp.normal_ = (
        lambda tensor, std, *key: normal(  # type: ignore[attr-defined]
            tensor, std, *key[:-1]
        )
    )


def broken_reference() -> None:
    def broken(*args: object) -> None:
        raise KeyError("capacity")

    naive_layer.apply_capacity = broken  # type: ignore[attr-defined]


def test_an_error_in_the_reference_is_a_row() -> None:
    """No traceback: the process that makes the reference failed, and the row says so."""
    report = verify(load(None, SHORT), worlds=[1], setup=broken_reference)
    assert report.first is not None
    assert report.first.quantity == "every rank finishes"
    assert "KeyError: 'capacity'" in report.first.where
