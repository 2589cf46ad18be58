"""`train.task=classification`: what fits together, and one sentence for what does not."""

from __future__ import annotations

import pytest

from dmoe.config.errors import ConfigError
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

BUDGET = (
    "moe.num_experts=2",
    "moe.top_k=2",
    "moe.experts.shapes=[[64],[]]",
    "moe.router.kind=budget",
)
BUDGET += ("moe.router.renormalize=false", "moe.router.budget=0.01")


def configured(*overrides: str) -> Config:
    return load(None, [*CLASSIFICATION, *overrides])


WRONG = {
    "no table": (["data.source=stdlib"], "data.source=stdlib: must be one of sklearn:digits"),
    "misspelled": (["data.source=sklearn:digit"], "use sklearn:digits"),
    "no such stream": (
        ["data.streams=[pixels,sound]"],
        r"holds sound, but sklearn:digits has pixels, profiles, strokes",
    ),
    "twice": (["data.streams=[pixels,pixels]"], "holds pixels twice"),
    "one stream, gated": (
        [*GATED, "data.streams=[pixels]"],
        "model.fusion=gated: joins two streams or more",
    ),
    "a router that chooses": (
        [*GATED, "moe.router.kind=top_k"],
        "moe.router.kind=top_k: must be fixed for model.fusion=gated",
    ),
    "two encoders": ([*GATED, "moe.top_k=2"], "moe.top_k=2: must be 1 for model.fusion=gated"),
    "one too many": (
        [*GATED, "moe.num_experts=3"],
        "moe.num_experts=3: must be the number of data.streams, 2",
    ),
    "gated head": ([*GATED, "model.head=experts"], "model.head=experts: must be linear"),
    "routed by the answer": (
        ["moe.router.kind=fixed"],
        "routes by a label of the sample, which is the answer",
    ),
    "no tokens": (["moe.router.kind=hash"], "routes by the ids of tokens"),
    "last stream": (["model.stream_dropout=0.3"], "model.stream_dropout=0.3: needs two streams"),
    "more than all": (
        [*GATED, "model.stream_dropout=1.5"],
        "model.stream_dropout=1.5: must be between 0 and 1",
    ),
    "a copy of another width": (
        ["model.head=experts", "moe.experts.copy=1"],
        "moe.experts.copy=1: cannot return an input",
    ),
    "no text": (
        ["data.tokenizer=x.json"],
        "data.tokenizer=x.json: has no meaning for train.task=classification",
    ),
    "no attention": (["model.rope_base=500"], "only for language_modelling"),
    "dear": (
        ["model.head=experts", "model.layers=0", *BUDGET],
        "less than the cheapest expert costs, 0.0676",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    overrides, said = WRONG[case]
    with pytest.raises(ConfigError, match=said) as raised:
        check(configured(*overrides))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.fusion=gated", "has no meaning for train.task=language_modelling"),
        ("model.head=experts", "has no meaning"),
        ("model.stream_dropout=0.1", "has no meaning"),
        ("data.streams=[pixels]", "has no meaning"),
        ("data.source=sklearn:digits", "set train.task=classification"),
        ("data.source=synthetic:clusters", "set train.task=classification"),
        ("model.layers=0", "model.layers=0: must be 1 or more"),
    ],
)
def test_a_language_model_reads_none_of_it(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(load(None, [override]))


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


def test_what_is_about_attention_is_not_asked_of_a_classifier() -> None:
    check(configured("model.dim=31", "model.layers=1"))
    check(configured("moe.router.kind=expert_choice"))  # no sample comes after another


def test_experts_of_a_head_or_of_encoders_are_shared_by_ranks() -> None:
    for overrides in (GATED, ("model.layers=0", "model.head=experts")):
        assert expert_parallel(configured(*overrides), 2) == 2
    assert expert_parallel(configured("model.layers=0"), 2) == 1, "there is no mixture layer"
