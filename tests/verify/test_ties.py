"""In float32 a choice between scores closer than rounding leaves a case undecided; everything else stays red."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoe.cli.verify import _print
from dmoe.config.load import load
from dmoe.moe.layer import MoE
from dmoe.moe.routing import Routing, TokenContext
from dmoe.verify.capture import Capture
from dmoe.verify.decisions import computed, recorded, witness
from dmoe.verify.naive import layer as naive
from dmoe.verify.ties import Finding, decide, following, judge
from dmoe.verify.verify import Report, Row, verify
from tests.verify.bugs import BUGS
from tests.verify.test_matrix import CAPACITIES, ROUTERS
from tests.verify.test_verify import SHORT, lines
from tests.verify.tie_cases import nudged, pushed, twins


def test_a_tie_is_undecided_and_does_not_fail() -> None:
    report = verify(load(None, SHORT), worlds=[2], dtype="float32", patch=nudged, setting=twins)
    assert report.ok, lines(report)
    assert set(report.undecided) == set(report.cases)
    assert all(
        "scores differ by" in sentence and sentence.startswith("a tie: token")
        for sentence in report.undecided.values()
    )
    rows = [row.quantity for row in report.rows]
    assert "loss" not in rows
    assert "initial weights" in rows


def test_twins_alone_are_equal() -> None:
    report = verify(load(None, SHORT), worlds=[1], dtype="float32", setting=twins)
    assert report.ok, lines(report)


@pytest.mark.parametrize(("dtype", "patch"), [("float32", pushed), ("float64", nudged)])
def test_more_than_rounding_is_red(dtype: str, patch: object) -> None:
    report = verify(load(None, SHORT), worlds=[1], dtype=dtype, patch=patch, setting=twins)  # type: ignore[arg-type]
    assert not report.ok
    assert not report.undecided
    assert report.first is not None
    assert report.first.quantity == "dropped set"


def test_a_race_is_no_tie() -> None:
    patch, settings, quantity, _ = BUGS["9 race"]
    report = verify(
        load(None, [*SHORT, *settings]), worlds=[1], dtype="float32", patch=patch, setting=twins
    )
    assert report.first is not None
    assert report.first.quantity == quantity, lines(report)
    assert not report.undecided


LEARNED = {name: settings for name, settings in ROUTERS.items() if name not in ("fixed", "hash")}


@pytest.mark.parametrize(
    "settings", [*LEARNED.values(), *CAPACITIES.values()], ids=[*LEARNED, *CAPACITIES]
)
@pytest.mark.parametrize("factor", ["null", "1.0"])
def test_sound_layers_keep_the_rules_in_float32(settings: list[str], factor: str) -> None:
    """The naive rules choose the same from a layer's scores, to the last bit: with twins, coarse inputs and a bias, on many tokens."""
    config = load(None, ["moe.num_experts=8", f"moe.capacity.factor={factor}", *settings])
    layer = MoE.from_config(config.moe, 16, virtual_ranks=2)
    layer.initialize(0, std=0.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.router.weight[1] = layer.router.weight[0]  # type: ignore[index]
        layer.router.bias_E.copy_(torch.randn(8, generator=generator) * 0.01)  # type: ignore[operator, union-attr]
    x = torch.randn(8, 64, 16, generator=generator).round(decimals=1)
    known = TokenContext(noise_key=(0, 0))
    with torch.no_grad(), recorded([layer]) as (outputs, before):
        layer(x, known)
        naive_output = naive.forward(layer, x, known)
    found = witness(layer, outputs[0], before[0], 8)
    assert found["lawful"].all()
    assert len(found["chosen"]) == 512
    assert witness(layer, naive_output, None, 8)["lawful"].all()


def test_what_the_router_chose_is_what_is_reported() -> None:
    layer = MoE(16, 8, 4, 2)
    with torch.no_grad(), recorded([layer]) as (outputs, before):
        layer(torch.randn(2, 8, 16))
    assert isinstance(before[0], Routing)
    assert computed(outputs[0].plan).sum() == 32


def captured(gap: float, *, flipped: bool) -> Capture:
    """Four tokens, two experts, one slot each: tokens 0 and 1 want expert 0, by scores `gap` apart; the better one is served."""
    score = np.array(
        [[0.6, 0.4], [0.6 + (gap if flipped else -gap), 0.4], [0.3, 0.7], [0.2, 0.8]], np.float32
    )
    chosen = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    served = chosen.copy()
    served[0 if flipped else 1, 0] = served[2, 1] = False
    found = {
        "score": score,
        "offset": np.zeros(2, np.float32),
        "size": np.ones(4, np.float32),
        "chosen": chosen,
    }
    found |= {"served": served, "lawful": np.ones(4, bool)}
    return {f"{what}/0/0/0": array for what, array in found.items()}


SCORES = load(None, ["moe.capacity.factor=1.0", "moe.capacity.priority=score"])


def test_a_queue_ordered_by_score_can_tie() -> None:
    truth, mine = captured(6e-8, flipped=False), captured(6e-8, flipped=True)
    found = judge(mine, truth, 0, SCORES, 1)
    assert found is not None
    assert "expert 0 took token 1 here and token 0 in the reference" in str(decide([found]))


def test_a_queue_with_other_scores_has_no_tie() -> None:
    assert (
        decide([judge(captured(1e-3, flipped=True), captured(1e-3, flipped=False), 0, SCORES, 1)])
        is None
    )


def test_who_breaks_the_rules_has_no_tie() -> None:
    mine = captured(6e-8, flipped=True)
    mine["lawful/0/0/0"][1] = False
    assert judge(mine, captured(6e-8, flipped=False), 0, SCORES, 1) is None
    assert decide([[], None]) is None


def test_another_bias_has_no_tie() -> None:
    mine = captured(6e-8, flipped=True)
    mine["offset/0/0/0"] = np.array([1e-7, 0], np.float32)
    assert decide([judge(mine, captured(6e-8, flipped=False), 0, SCORES, 1)]) is None


def finding(step: int, part: int, unit: int, layer: int, *, tie: bool) -> Finding:
    return Finding(step, part, unit, layer, tie, f"{step}{part}{unit}{layer}")


def test_only_first_causes_are_judged() -> None:
    tie = finding(0, 0, 0, 0, tie=True)
    later = [
        finding(0, 0, 0, 1, tie=False),
        finding(1, 0, 1, 0, tie=False),
    ]  # a later layer of the unit on another rank; a later step
    assert decide([[tie], later]) == tie
    assert decide([[tie], [finding(0, 0, 1, 1, tie=False)]]) is None, (
        "another unit does not follow from it"
    )
    assert decide([[tie], [finding(0, 1, 0, 0, tie=False)]]) is None, (
        "nor does another accumulation step"
    )
    assert decide([[], []]) is None
    assert "loss" in following(0)
    assert following(1) == ("bias", "parameters after two steps")


def test_the_report_shows_what_is_undecided(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("initial weights", True, 0.0, 1e-5, "2 ranks", "", "")
    _print(
        Report([row], ["2 ranks"], {}, {"2 ranks": "a tie: token 9 chose expert 1"}, "float32", 1.0)
    )
    shown = capsys.readouterr().out
    assert "undecided: 2 ranks: a tie: token 9 chose expert 1" in shown
    assert "every other case trains the same model" in shown
