"""Recommended ranges: defaults and shipped configs keep them or give a reason."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmoe.config.load import load
from dmoe.config.recommended import RECOMMENDED, as_table, out_of_range
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.explain import explain
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
OVERRIDES = {
    "jitter": ["moe.router.jitter=0.5"],
    "top_p": ["moe.router.kind=adaptive", "moe.router.renormalize=false", "moe.router.top_p=0.95"],
    "min_weight": [
        "moe.router.kind=budget",
        "moe.router.renormalize=false",
        "moe.router.min_weight=0.3",
    ],
    "load": ["moe.router.kind=noisy", "moe.balance.load=0.5"],
    "top_k": ["moe.num_experts=16", "moe.top_k=9"],
    "shared": ["moe.experts.shared=3"],
}


def test_every_default_that_is_a_value_is_inside_its_range() -> None:
    """Mechanisms that are off by default have no value; here every field is read."""
    assert out_of_range(Config()) == []
    for item in RECOMMENDED:
        value = replace(item, applies=lambda moe: True).value(Config().moe)
        assert value == 0.0 or item.low <= value <= item.high, item.field


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_config_is_inside_or_says_why(path: Path) -> None:
    for remark in out_of_range(load(path)):
        name = remark.field.rpartition(".")[2]
        assert re.search(rf"^ +{name}: .*# ", path.read_text(encoding="utf-8"), re.M), (
            f"{remark} Its line has no comment."
        )


@pytest.mark.parametrize("item", RECOMMENDED, ids=lambda item: item.field)
def test_outside_is_a_remark_and_no_refusal(item: object) -> None:
    """Each field in turn beyond its upper end; at the end itself there is nothing to say."""
    field, name = f"moe.{item.field}", item.field.rpartition(".")[2]  # type: ignore[attr-defined]
    overrides = OVERRIDES.get(name, [f"{field}={2 * item.high:g}"])  # type: ignore[attr-defined]
    config = tiny(*overrides)
    check(config)
    assert [remark.field for remark in out_of_range(config)] == [field]
    sections = {section.key: section for section in explain(config, 1)}
    assert f"{field}=" in sections["recommended"].sentences[0]
    assert " is above the recommended " in sections["recommended"].sentences[0]
    assert sections["recommended"].numbers[field]["high"] == item.high  # type: ignore[attr-defined]
    at_upper_end = [
        f"{field}={item.high:g}" if word.startswith(field) else word for word in overrides
    ]  # type: ignore[attr-defined]
    assert "recommended" not in {section.key for section in explain(tiny(*at_upper_end), 1)}


def test_field_that_the_router_does_not_read_has_no_range() -> None:
    """For adaptive, moe.top_k is the most a token takes, and for soft it is all experts."""
    many = ["moe.num_experts=16", "moe.top_k=16"]
    assert [remark.field for remark in out_of_range(tiny(*many))] == ["moe.top_k"]
    assert out_of_range(tiny(*many, "moe.router.kind=soft")) == []
    assert (
        out_of_range(tiny(*many, "moe.router.kind=adaptive", "moe.router.renormalize=false")) == []
    )


def test_below_the_range_is_a_remark_and_a_dense_model_has_none() -> None:
    assert "is below the recommended 1 to 2" in str(
        out_of_range(tiny("moe.capacity.factor=0.5"))[0]
    )
    dense = explain(tiny("moe.capacity.factor=0.5", "model.moe_every=0"), 1)
    assert "recommended" not in {section.key for section in dense}


def test_the_document_shows_the_table_that_is_checked() -> None:
    assert as_table() in (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")


PUBLISHED = {
    "switch.yaml": ("switch", 0.01, 1, 1),
    "deepseek_moe_16b.yaml": ("switch", 0.001, 1, 1),
    "mixtral_8x7b.yaml": ("switch", 0.02, 2, 32),
    "qwen3_30b_a3b.yaml": ("switch", 0.001, 8, 48),
    "olmoe_1b_7b.yaml": ("switch", 0.01, 1, 16),
}
"""Loss, published coefficient, value of the published loss at balance, layers it is averaged over."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_coefficients_are_converted(name: str) -> None:
    """Three configs had the published number under a comment that gave another one (6 to 16 times
    smaller), and `dmoe explain` warned against the number of the comment."""
    loss, coefficient, at_balance, layers = PUBLISHED[name]
    config = load(ROOT / "configs" / name)
    converted = coefficient * at_balance / layers
    assert getattr(config.moe.balance, loss) == pytest.approx(converted, rel=5e-3)
    assert config.model.layers == layers or layers == 1
    assert out_of_range(config) == []


def test_converted_coefficients_pull_on_a_router_as_published() -> None:
    """The gradient of transformers' loss of 32 equal layers, times 0.02, in one layer's logits is
    that of dmoe's Switch loss, times 0.00125."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logit_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layers = tuple(logit_TE.detach().clone().requires_grad_() for _ in range(32))
    (0.02 * mixtral.load_balancing_loss_func(layers, num_experts=8, top_k=2)).backward()
    score_TE = logit_TE.softmax(-1)
    count_E = torch.bincount(score_TE.topk(2).indices.flatten(), minlength=8)
    (0.00125 * 8 * (count_E / count_E.sum() * score_TE.mean(0)).sum()).backward()
    assert torch.allclose(layers[7].grad, logit_TE.grad, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", ["moe.balance.switch", "moe.balance.z"])
def test_faithful_values_are_no_remark_and_a_tenth_of_them_is(name: str) -> None:
    low = next(item.low for item in RECOMMENDED if f"moe.{item.field}" == name)
    assert [remark.field for remark in out_of_range(tiny(f"{name}={low / 10:g}"))] == [name]
