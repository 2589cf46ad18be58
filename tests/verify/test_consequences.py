"""A difference that follows from another is marked, so that the first row names the cause.

With two MoE layers a wrong output of the first showed up as "dropped set" of the second: of 28 bugs
that `verify` caught, 10 were named right.
"""

from __future__ import annotations

import pytest

from dmoe.verify.cases import Case
from dmoe.verify.causes import make_row
from dmoe.verify.differences import QUANTITIES, STAGES, Difference, mark_consequences


def red(quantity: str, step: int = 0, layer: int = -1) -> Difference:
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
