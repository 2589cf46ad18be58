"""Float32 ties leave a case undecided; every other difference is reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmoe.cli.verify import print_report
from dmoe.config.load import load
from dmoe.config.router_kinds import kinds_where
from dmoe.moe.layer import MoE
from dmoe.moe.routing import Routing, TokenContext
from dmoe.verify.capture import Capture
from dmoe.verify.causes import Report, Row
from dmoe.verify.decisions import computed_experts, decision_inputs, record_routing
from dmoe.verify.differences import Difference
from dmoe.verify.naive import layer as naive
from dmoe.verify.ties import UnitDifference, find_tie, first_differences, is_affected
from dmoe.verify.verify import verify
from tests.verify.bugs import BUGS
from tests.verify.test_matrix import CAPACITIES, ROUTERS
from tests.verify.test_verify import SHORT, lines
from tests.verify.tie_cases import equal_experts, shift_beyond_rounding, shift_by_rounding

pytestmark = pytest.mark.ranks


def test_a_tie_is_undecided_and_does_not_fail() -> None:
    report = verify(
        load(None, SHORT), worlds=[2], dtype="float32", patch=shift_by_rounding, setup=equal_experts
    )
    assert report.ok, lines(report)
    # the case of tied scores sets the row of expert 0 to zero: experts 0 and 1 are not equal in it
    in_float32 = {case for case in report.cases if not case.endswith("tied scores")}
    assert set(report.undecided) == in_float32
    assert all(
        "scores differ by" in sentence and sentence.startswith("a tie: token")
        for sentence in report.undecided.values()
    )
    losses = [row for row in report.rows if row.quantity == "loss"]
    assert all(row.case.endswith("tied scores") for row in losses)
    assert "initial weights" in [row.quantity for row in report.rows]


def test_equal_experts_without_a_patch_are_equal() -> None:
    report = verify(load(None, SHORT), worlds=[1], dtype="float32", setup=equal_experts)
    assert report.ok, lines(report)


@pytest.mark.parametrize(
    ("dtype", "patch"), [("float32", shift_beyond_rounding), ("float64", shift_by_rounding)]
)
def test_more_than_rounding_is_a_difference(dtype: str, patch: Callable[[], None]) -> None:
    report = verify(load(None, SHORT), worlds=[1], dtype=dtype, patch=patch, setup=equal_experts)
    assert not report.ok
    assert not report.undecided
    assert report.first is not None
    assert report.first.quantity == "router scores"


def test_a_race_is_no_tie() -> None:
    patch, settings, quantity, _ = BUGS["9 race"]
    report = verify(
        load(None, [*SHORT, *settings]),
        worlds=[1],
        dtype="float32",
        patch=patch,
        setup=equal_experts,
    )
    assert report.first is not None
    assert report.first.quantity == quantity, lines(report)
    assert not report.undecided


LEARNED = {
    name: settings for name, settings in ROUTERS.items() if name not in kinds_where(learned=False)
}


@pytest.mark.parametrize(
    "settings", [*LEARNED.values(), *CAPACITIES.values()], ids=[*LEARNED, *CAPACITIES]
)
@pytest.mark.parametrize("factor", ["null", "1.0"])
def test_correct_layers_follow_the_rules_in_float32(settings: list[str], factor: str) -> None:
    """The naive rules choose the same from a layer's scores, bit for bit.

    512 tokens, with two equal experts, coarse inputs and a bias.
    """
    needs_slots = ("moe.capacity.overflow=next_choice", "moe.capacity.pool=4")
    if factor == "null" and set(needs_slots) & set(settings):
        pytest.skip("refused: without a capacity nothing overflows")
    config = load(None, ["moe.num_experts=8", f"moe.capacity.factor={factor}", *settings])
    layer = MoE.from_config(config.moe, 16, virtual_ranks=2)
    layer.initialize(0, std=0.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight_ED = layer.router.get_parameter("weight")
        weight_ED[1] = weight_ED[0]
        layer.router.get_buffer("bias_E").copy_(torch.randn(8, generator=generator) * 0.01)
    x = torch.randn(8, 64, 16, generator=generator).round(decimals=1)
    context = TokenContext(noise_key=(0, 0))
    with torch.no_grad(), record_routing([layer]) as (outputs, routings):
        layer(x, context)
        naive_output = naive.forward(layer, x, context)
    found = decision_inputs(layer, outputs[0], routings[0], 8)
    assert found["follows_rules"].all()
    assert len(found["chosen"]) == 512
    assert decision_inputs(layer, naive_output, None, 8)["follows_rules"].all()


def test_recorded_routing_is_the_routers_decision() -> None:
    layer = MoE(16, 8, 4, 2)
    with torch.no_grad(), record_routing([layer]) as (outputs, routings):
        layer(torch.randn(2, 8, 16))
    assert isinstance(routings[0], Routing)
    assert computed_experts(outputs[0].plan).sum() == 32


def capture_with_gap(gap: float, *, flipped: bool) -> Capture:
    """Make a capture of four tokens and two experts with one slot each.

    Tokens 0 and 1 choose expert 0 with scores `gap` apart; the larger score is kept. `flipped`
    exchanges the two scores.
    """
    score = np.array(
        [[0.6, 0.4], [0.6 + (gap if flipped else -gap), 0.4], [0.3, 0.7], [0.2, 0.8]], np.float32
    )
    chosen = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    computed = chosen.copy()
    computed[0 if flipped else 1, 0] = computed[2, 1] = False
    found = {
        "score": score,
        "router_bias": np.zeros(2, np.float32),
        "max_logit": np.ones(4, np.float32),
        "chosen": chosen,
    }
    found |= {"computed": computed, "follows_rules": np.ones(4, bool)}
    return {f"{key}/0/0/0": array for key, array in found.items()}


SCORES = load(None, ["moe.capacity.factor=1.0", "moe.capacity.priority=score"])


def test_a_queue_ordered_by_score_can_tie() -> None:
    expected, actual = capture_with_gap(6e-8, flipped=False), capture_with_gap(6e-8, flipped=True)
    found = first_differences(actual, expected, 0, SCORES, 1)
    assert found is not None
    assert "expert 0 took token 1 here and token 0 in the reference" in str(find_tie([found]))


def test_a_queue_with_other_scores_has_no_tie() -> None:
    assert (
        find_tie(
            [
                first_differences(
                    capture_with_gap(1e-3, flipped=True),
                    capture_with_gap(1e-3, flipped=False),
                    0,
                    SCORES,
                    1,
                )
            ]
        )
        is None
    )


def test_a_rank_that_breaks_the_rules_has_no_tie() -> None:
    actual = capture_with_gap(6e-8, flipped=True)
    actual["follows_rules/0/0/0"][1] = False
    assert first_differences(actual, capture_with_gap(6e-8, flipped=False), 0, SCORES, 1) is None
    assert find_tie([[], None]) is None


def test_another_bias_has_no_tie() -> None:
    actual = capture_with_gap(6e-8, flipped=True)
    actual["router_bias/0/0/0"] = np.array([1e-7, 0], np.float32)
    assert (
        find_tie([first_differences(actual, capture_with_gap(6e-8, flipped=False), 0, SCORES, 1)])
        is None
    )


def difference(step: int, micro_step: int, unit: int, layer: int, *, tie: bool) -> UnitDifference:
    name = f"{step}{micro_step}{unit}{layer}"
    return UnitDifference(step, micro_step, unit, layer, tie, name)


def test_only_first_differences_are_examined() -> None:
    tie = difference(0, 0, 0, 0, tie=True)
    # a later layer of the unit on another rank; a later step
    later = [difference(0, 0, 0, 1, tie=False), difference(1, 0, 1, 0, tie=False)]
    assert find_tie([[tie], later]) == tie
    assert find_tie([[tie], [difference(0, 0, 1, 1, tie=False)]]) is None, (
        "another unit does not follow from it"
    )
    assert find_tie([[tie], [difference(0, 1, 0, 0, tie=False)]]) is None, (
        "nor does another accumulation step"
    )
    assert find_tie([[], []]) is None


def test_what_a_tie_changes_is_not_compared() -> None:
    loss, slots = Difference("loss", "", 1.0), Difference("capacity slots", "", 1.0)
    assert is_affected(loss, 0)
    assert not is_affected(loss, 1), "a tie in the second step changes nothing of the first"
    assert is_affected(replace(loss, step=1), 1)
    assert not is_affected(slots, 0), "slots do not depend on choices"
    assert not is_affected(Difference("every rank finishes", "", 1.0), 0)


def test_the_report_shows_what_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("initial weights", True, 0.0, 1e-5, "2 ranks", "", "")
    print_report(
        Report([row], ["2 ranks"], {}, {"2 ranks": "a tie: token 9 chose expert 1"}, "float32", 1.0)
    )
    output = capsys.readouterr().out
    assert "undecided: 2 ranks: a tie: token 9 chose expert 1" in output
    assert "every other case trains the same model" in output
