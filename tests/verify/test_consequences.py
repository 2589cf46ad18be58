"""A difference that follows from another is marked, so that the first row names the cause.

With two MoE layers a wrong output of the first showed up as "dropped set" of the second: of 28 bugs
that `verify` caught, 10 were named right.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import dmoe.verify.verify as verification
from dmoe.config.schema import Config
from dmoe.distributed.local_ranks import RankError
from dmoe.verify import findings
from dmoe.verify.cases import Case
from dmoe.verify.causes import make_row
from dmoe.verify.differences import (
    QUANTITIES,
    STAGES,
    Difference,
    failure_of,
    mark_consequences,
)


def red(quantity: str, step: int = 0, layer: float = -1) -> Difference:
    return Difference(quantity, "", 1.0, exact=True, step=step, layer=layer)


CHAINS = {
    "a later layer of the forward": (red("layer outputs", 0, 0), red("dropped set", 0, 1)),
    "a later part of the same layer": (red("router scores", 0, 1), red("chosen experts", 0, 1)),
    "an earlier layer of the backward": (
        red("input gradients", 0, 1),
        red("expert gradients", 0, 0),
    ),
    "the input's gradient after the experts'": (
        red("expert gradients", 0, 1),
        red("input gradients", 0, 1),
    ),
    "routers are dense": (red("dense gradients"), red("router gradient", 0, 0)),
    "the backward after the forward": (red("layer outputs", 0, 1), red("output gradients", 0, 1)),
    "the loss after the layers": (red("layer outputs", 0, 1), red("loss")),
    "parameters after the clip": (red("clip coefficient"), red("parameters after two steps")),
    "the layer after the modules before it": (
        red("module outputs", 0, 0.5),
        red("router scores", 0, 1),
    ),
    "the modules after the layer before them": (
        red("combine weights", 0, 0),
        red("module outputs", 0, 0.5),
    ),
    "the evaluation after the training": (
        red("parameters after two steps", 1),
        red("evaluation", 1),
    ),
    "the second step after the first": (
        red("parameters after two steps"),
        red("router scores", 1, 0),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_consequence_follows_and_its_cause_does_not(name: str) -> None:
    for order in (CHAINS[name], CHAINS[name][::-1]):
        marked = {d.quantity: d.follows for d in mark_consequences(order, "float64")}
        assert marked == {CHAINS[name][0].quantity: False, CHAINS[name][1].quantity: True}


def test_the_second_steps_activations_do_not_explain_the_first_steps_gradients() -> None:
    """Dense gradients that were averaged were named "router gradient" for this reason."""
    found = [
        red("dense gradients"),
        red("router gradient", 0, 0),
        red("input gradients", 1, 0),
    ]
    assert [d.follows for d in mark_consequences(found, "float64")] == [False, True, True]


def test_independent_rows_follow_from_nothing() -> None:
    independent = [q for q in QUANTITIES if all(q not in names for names in STAGES)]
    found = [red("initial weights"), *(red(quantity, 1) for quantity in independent)]
    assert not any(d.follows for d in mark_consequences(found, "float64"))
    assert "every rank finishes" in independent
    assert "checkpoint written here, read by 1" in independent


def test_a_row_shows_the_cause_where_one_case_has_it() -> None:
    small = red("loss")
    follows = Difference("loss", "", 9.0, exact=True, follows=True)
    case = Case(2, 1, 1, "packed", "ddp")
    row = make_row("loss", [(case, follows), (case, small)], "float64")
    assert row is not None
    assert (row.size, row.follows) == (1.0, False)
    alone = make_row("loss", [(case, follows)], "float64")
    assert alone is not None
    assert alone.follows
    assert alone.cause == "follows from another difference"


def test_the_second_steps_routing_is_left_out_where_scores_are_tied() -> None:
    """Experts that no token takes get equal gradients but for rounding: four ranks break the tie.

    `verify` called correct code different on four ranks with EP = 1 and FSDP. The first step of the
    case, and both steps of every other case, are compared.
    """
    found = [red("chosen experts", 0, 0), red("chosen experts", 1, 0), red("capacity slots", 1, 0)]
    ranks = [findings.RankFindings(found, [])]
    kept = {
        tied: [
            (d.quantity, d.step)
            for _, d in findings.merge_ranks(
                Case(4, 1, 1, "packed", "fsdp", tied=tied), ranks, "float64"
            ).differences
        ]
        for tied in (False, True)
    }
    assert kept[False] == [(d.quantity, d.step) for d in found]
    assert kept[True] == [("chosen experts", 0), ("capacity slots", 1)]


def test_a_process_that_raised_names_the_place_in_the_product() -> None:
    """The last line alone, "index 4 is out of bounds", names no area."""
    trace = (
        "rank 1 failed:\n"
        '  File "/x/dmoe/distributed/local_ranks.py", line 7, in _rank_main\n'
        '  File "/x/dmoe/verify/verify.py", line 9, in _compare_case\n'
        '  File "/x/dmoe/moe/layer.py", line 210, in forward\n'
        '  File "/x/dmoe/moe/experts/zero_cost.py", line 58, in forward\n'
        '  File "/x/torch/functional.py", line 5, in index_select\n'
        "IndexError: index 4 is out of bounds"
    )
    found = failure_of(trace)
    assert found.quantity == "every rank finishes"
    assert found.finding == "raised in dmoe/moe/experts/zero_cost.py, line 58"
    assert failure_of(f"{trace}\nRuntimeError: [counts] no").quantity == "counts"


def test_ranks_that_fail_only_together_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases of a start that fails run again one by one; if all pass, the failure was lost."""
    cases = [(n, Case(2, 1, 1, "packed", mode)) for n, mode in enumerate(("ddp", "fsdp"))]

    def run_ranks(world: int, run: object, job: verification._Job, **options: object) -> object:
        if len(job.cases) > 1:
            raise RankError("rank 1 raised\nRuntimeError: the groups of the first case are left")
        return [[findings.RankFindings([], [])]] * world

    monkeypatch.setattr(verification, "run_ranks", run_ranks)
    job = verification._Job(Config(), cases, Path("none"), "float64", None, None)
    found = verification._run_world(job, 2).differences
    row = make_row("every rank finishes", found, "float64")
    assert row is not None
    assert not row.ok
    assert "groups of the first case" in row.where
