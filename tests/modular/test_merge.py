"""Merging: the merged network computes what the mixture with constant weights computed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.modular import (
    BANKS,
    Adapter,
    LoRA,
    SparseDelta,
    adapter_layers,
    attach,
    average,
    base_model_hash,
    constant,
    merge,
    routed,
)
from tests.modular.nets import D, M, drawn, hugging_face, mlp, randomize

MERGEABLE = ("low_rank", "sparse_delta", "scale")


@pytest.mark.parametrize("kind", MERGEABLE)
@settings(max_examples=8, deadline=None)
@given(weights=st.lists(st.floats(-1.5, 1.5), min_size=M, max_size=M))
def test_merged_weights_equal_the_mixture_with_constant_weights(
    kind: str, weights: list[float]
) -> None:
    """Task arithmetic in float32 with weights of any sign; Scale changes the bias too."""
    model = mlp(torch.float32)
    attach(model, "[02]", partial(BANKS[kind], M), constant(*weights))
    randomize(model)
    x = drawn(9, D, dtype=torch.float32)
    mixture = model(x)
    merge(model, weights)
    assert adapter_layers(model) == {}
    torch.testing.assert_close(
        model(x), mixture, rtol=1e-5, atol=1e-6 * max(1.0, float(mixture.detach().abs().max()))
    )


def test_a_hugging_face_model_merges() -> None:
    model, tokens = hugging_face(), torch.arange(8).view(1, 8)
    attach(model, "*_proj", partial(LoRA, 2, rank=2), constant(0.7, 0.3))
    randomize(model)
    mixture = model(tokens).logits
    merge(model, [0.7, 0.3])
    torch.testing.assert_close(model(tokens).logits, mixture, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["low_rank", "adapter", "scale", "prompt"])
def test_an_average_is_one_module_of_averaged_parameters(kind: str) -> None:
    model = mlp()
    options = {"length": 2} if kind == "prompt" else {}
    attach(model, "[02]", partial(BANKS[kind], M, **options), routed("top_k", M, 2))
    randomize(model)
    weights, core = [0.5, 0.25, 0.25, 0.0], base_model_hash(model)
    expected = {
        n: sum(w * p[m] for m, w in enumerate(weights))
        for n, p in adapter_layers(model)["2"].experts.named_parameters()
    }
    average(model, weights)
    bank = adapter_layers(model)["2"].experts
    assert bank.num_modules == 1
    for name, value in bank.named_parameters():
        torch.testing.assert_close(value[0], expected[name])
    assert model(drawn(2, 5, D)).isfinite().all()
    assert base_model_hash(model) == core


def test_modules_of_one_start_average_to_themselves() -> None:
    model, x = mlp(), drawn(4, D)
    attach(model, "0", partial(Adapter, 2, hidden=3), constant(1.0, 0.0))
    randomize(model)
    before = model(x)
    average(model, [1.0, 0.0])
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize(
    ("bank", "act", "weights", "word"),
    [
        (partial(Adapter, M), merge, [1.0] * M, "adds no matrix"),
        (partial(LoRA, M), merge, [1.0], "one weight for each of the 4"),
        (partial(LoRA, M), average, [1.0], "one weight for each of the 4"),
        (partial(SparseDelta, M), average, [1.0] * M, "different positions"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(
    bank: object, act: object, weights: list[float], word: str
) -> None:
    model = mlp()
    attach(model, "[02]", bank, routed("top_k", M, 2))  # type: ignore[arg-type]
    before = base_model_hash(model)
    with pytest.raises(ConfigError, match=word):
        act(model, weights)  # type: ignore[operator]
    assert base_model_hash(model) == before
    assert len(adapter_layers(model)) == 2
