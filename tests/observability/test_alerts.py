"""Routing alerts: raised once, with layer and advice, and again only after they have cleared."""

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


def test_good_line_raises_no_alert() -> None:
    alerts = Alerts(AlertsConfig(), top_k=2)
    assert [alerts.check(line(EVEN)) for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize(
    ("bad", "message", "advice"),
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
def test_each_alert_is_raised_once(bad: dict[str, Any], message: str, advice: str) -> None:
    alerts = Alerts(AlertsConfig(patience=1), top_k=1)
    (text,) = alerts.check(bad)
    assert text.startswith(message)
    assert advice in text.split("what usually helps: ")[1]
    assert [alerts.check(bad) for _ in range(3)] == [[]] * 3


def test_low_entropy_is_saturation() -> None:
    almost = line(EVEN, top1=0.98)
    almost["layers"][0]["router_entropy"] = 0.001
    (text,) = Alerts(AlertsConfig(patience=1), top_k=1).check(almost)
    assert text.startswith("router saturation")


def test_patience_counts_consecutive_lines() -> None:
    alerts = Alerts(AlertsConfig(patience=2), top_k=1)
    bad = line(EVEN, drop=0.5)
    assert [len(alerts.check(values)) for values in (bad, line(EVEN), bad, bad, bad)] == [
        0,
        0,
        0,
        1,
        0,
    ]


def test_alert_repeats_only_after_it_has_cleared() -> None:
    """A drop rate around the limit of 20% raises one alert; below 18% it has cleared."""
    alerts = Alerts(AlertsConfig(patience=1), top_k=1)
    alerted = [
        len(alerts.check(line(EVEN, drop=drop))) for drop in (0.21, 0.19, 0.21, 0.19, 0.17, 0.21)
    ]
    assert alerted == [1, 0, 0, 0, 0, 1]


def test_layers_share_one_alert() -> None:
    (text,) = Alerts(AlertsConfig(patience=1), top_k=1).check(line(EVEN, drop=0.4, layers=3))
    assert "40% of the choices are dropped (at the worst) in layers 0, 1, 2;" in text


def test_collapse_limit_depends_on_top_k() -> None:
    """With K = 2 of 8 experts max/mean is at most 4, a fixed limit would miss it; K = E is even."""
    worst = line([32, 32, 0, 0, 0, 0, 0, 0], top1=None)
    config = AlertsConfig(patience=1, dead_share=None)
    assert len(Alerts(config, top_k=2).check(worst)) == 1
    assert Alerts(config, top_k=8).check(line(EVEN)) == []


def test_null_disables_an_alert() -> None:
    off = AlertsConfig(
        load=None, dead_share=None, drop_rate=None, certainty=None, straggler=None, patience=1
    )
    assert Alerts(off, top_k=1).check(line(COLLAPSED, drop=1.0, top1=1.0, straggler=9.0)) == []


def test_missing_or_nan_value_is_no_alert() -> None:
    broken = line(EVEN, top1=math.nan, drop=math.nan)
    del broken["straggler"]
    assert Alerts(AlertsConfig(patience=1), top_k=1).check(broken) == []
