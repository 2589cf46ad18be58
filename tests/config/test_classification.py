"""`train.task=classification`: widths of the MoE layers and ranks that share them."""

from __future__ import annotations

from dmoe.config.load import load
from dmoe.config.rules import check, expert_parallel, moe_widths
from dmoe.config.schema import Config

CLASSIFICATION = ("train.task=classification", "data.source=sklearn:digits")
GATED = (
    "data.streams=[pixels,strokes]",
    "model.fusion=gated",
    "moe.router.kind=fixed",
    "moe.top_k=1",
    "moe.num_experts=2",
)


def configured(*overrides: str) -> Config:
    return load(None, [*CLASSIFICATION, *overrides])


def test_every_mixture_layer_has_its_widths() -> None:
    streams = "data.streams=[pixels,strokes]"
    assert moe_widths(configured(streams, "model.layers=0")) == []
    assert moe_widths(configured(streams, "model.layers=0", "model.head=experts")) == [(84, 10)]
    assert moe_widths(configured("model.layers=2", "model.dim=30", "model.head=experts")) == [
        (30, 30),
        (30, 30),
        (30, 10),
    ]
    assert moe_widths(configured(*GATED, "model.layers=2")) == [(128, 128)]
    assert moe_widths(load(None, ["model.dense_first=1"])) == [(128, 128)] * 2


def test_rules_about_attention_do_not_apply_to_a_classifier() -> None:
    check(configured("model.dim=31", "model.layers=1"))
    check(configured("moe.router.kind=expert_choice"))  # no sample comes after another


def test_experts_of_a_head_or_of_encoders_are_shared_by_ranks() -> None:
    for overrides in (GATED, ("model.layers=0", "model.head=experts")):
        assert expert_parallel(configured(*overrides), 2) == 2
    assert expert_parallel(configured("model.layers=0"), 2) == 1, "there is no mixture layer"
