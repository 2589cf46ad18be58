"""Alerts are said once, name the layer and the cure, and come again only after the number was well inside its limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dmoe.config.schema import AlertsConfig
from dmoe.observability.alerts import Alerts


def line(
    load: list[int],
    *,
    drop: float = 0.0,
    top1: float | None = 0.5,
    straggler: float = 1.0,
    layers: int = 1,
) -> dict[str, Any]:
    layer: dict[str, Any] = {
        "load": load,
        "load_max_over_mean": max(load) * len(load) / sum(load),
        "dead_experts": load.count(0),
        "drop_rate": drop,
    }
    if top1 is not None:
        layer |= {"top1_probability": top1, "router_entropy": 0.9 * math.log(len(load))}
    return {
        "straggler": straggler,
        "layers": [{"layer": index, **layer} for index in range(layers)],
    }


EVEN = [8] * 8
COLLAPSED = [64, 0, 0, 0, 0, 0, 0, 0]


def test_a_good_line_says_nothing() -> None:
    alerts = Alerts(AlertsConfig(), top_k=2)
    assert [alerts.judge(line(EVEN)) for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize(
    ("bad", "says", "cure"),
    [
        (
            line([20] + [1] * 7, top1=None),
            "expert collapse: the busiest expert takes 5.9 times",
            "moe.balance.switch",
        ),
        (line([8, 8, 8, 8, 8, 8, 8, 0]), "dead experts: 12%", "moe.balance.bias"),
        (line(EVEN, drop=0.3), "30% of the choices are dropped", "moe.capacity.factor"),
        (line(EVEN, top1=0.999), "router saturation: a certainty of 0.999", "moe.balance.z"),
        (line(EVEN, straggler=2.5), "the slowest rank takes 2.5 times", "throttling"),
    ],
    ids=["collapse", "dead", "drops", "saturation", "straggler"],
)
def test_each_trouble_is_said_once(bad: dict[str, Any], says: str, cure: str) -> None:
    alerts = Alerts(AlertsConfig(patience=1), top_k=1)
    (text,) = alerts.judge(bad)
    assert text.startswith(says)
    assert cure in text.split("what usually helps: ")[1]
    assert [alerts.judge(bad) for _ in range(3)] == [[]] * 3


def test_low_entropy_is_saturation_too() -> None:
    almost = line(EVEN, top1=0.98)
    almost["layers"][0]["router_entropy"] = 0.001
    (text,) = Alerts(AlertsConfig(patience=1), top_k=1).judge(almost)
    assert text.startswith("router saturation")


def test_patience_counts_lines_in_a_row() -> None:
    alerts = Alerts(AlertsConfig(patience=2), top_k=1)
    bad = line(EVEN, drop=0.5)
    assert [len(alerts.judge(values)) for values in (bad, line(EVEN), bad, bad, bad)] == [
        0,
        0,
        0,
        1,
        0,
    ]


def test_it_comes_again_only_after_it_has_cleared() -> None:
    """A drop rate that wanders around the limit of 20% is said once; below 18% it has cleared."""
    alerts = Alerts(AlertsConfig(patience=1), top_k=1)
    said = [
        len(alerts.judge(line(EVEN, drop=drop))) for drop in (0.21, 0.19, 0.21, 0.19, 0.17, 0.21)
    ]
    assert said == [1, 0, 0, 0, 0, 1]


def test_layers_share_a_text() -> None:
    (text,) = Alerts(AlertsConfig(patience=1), top_k=1).judge(line(EVEN, drop=0.4, layers=3))
    assert "40% of the choices are dropped (at the worst) in layers 0, 1, 2;" in text


def test_collapse_scales_with_what_is_possible() -> None:
    """With K = 2 of 8 experts the worst is 4 times the mean: a fixed limit of 4 would never speak. With K = E nothing can be uneven."""
    worst = line([32, 32, 0, 0, 0, 0, 0, 0], top1=None)
    config = AlertsConfig(patience=1, dead_share=None)
    assert len(Alerts(config, top_k=2).judge(worst)) == 1
    assert Alerts(config, top_k=8).judge(line(EVEN)) == []


def test_null_turns_one_off() -> None:
    off = AlertsConfig(
        load=None, dead_share=None, drop_rate=None, certainty=None, straggler=None, patience=1
    )
    assert Alerts(off, top_k=1).judge(line(COLLAPSED, drop=1.0, top1=1.0, straggler=9.0)) == []


def test_a_missing_or_broken_number_is_no_alert() -> None:
    broken = line(EVEN, top1=math.nan, drop=math.nan)
    del broken["straggler"]
    assert Alerts(AlertsConfig(patience=1), top_k=1).judge(broken) == []
