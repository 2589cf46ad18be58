"""Every weight is a function of (seed, name), not of device, earlier draws or other layers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dmoe.config.schema import ExpertsConfig, ModelConfig
from dmoe.models.transformer import Transformer
from tests.models.small import MODEL, MOE, VOCAB, batch, small

SHARED = replace(MOE, experts=ExpertsConfig(shared=1))
MIXED = replace(MODEL, dense_first=1)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(one: Transformer, other: Transformer) -> None:
    assert weights(one).keys() == weights(other).keys()
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name


def test_meta_then_empty_then_initialize_equals_direct_construction():
    direct = Transformer(MIXED, SHARED, VOCAB)
    direct.initialize(3)
    with torch.device("meta"):
        later = Transformer(MIXED, SHARED, VOCAB)
    later.to_empty(device="cpu")
    for p in later.parameters():  # whatever the memory held
        p.data.fill_(torch.nan)
    later.initialize(3)
    assert_equal(direct, later)
    token, _ = batch()
    assert torch.equal(direct(token).logits, later(token).logits)


def test_the_constructor_leaves_the_weights_of_seed_zero():
    torch.manual_seed(5)
    fresh, again = Transformer(MIXED, SHARED, VOCAB), Transformer(MIXED, SHARED, VOCAB)
    again.initialize(1)
    assert not torch.equal(fresh.embedding.weight, again.embedding.weight)
    again.initialize(0)
    assert_equal(fresh, again)


def test_weights_do_not_depend_on_the_layers_around_them():
    """More layers change only the scale of what writes to the residual stream."""
    short, long = (Transformer(replace(MODEL, layers=n), SHARED, VOCAB) for n in (2, 3))
    for name, weight in weights(short).items():
        scale = math.sqrt(2 / 3) if name.endswith(("w_out", "w_out.weight")) else 1.0
        torch.testing.assert_close(weights(long)[name], weight * scale, msg=name)


def test_an_expert_shard_draws_the_weights_of_its_global_experts():
    whole, part = Transformer(MODEL, MOE, VOCAB), Transformer(MODEL, MOE, VOCAB)
    for layer in part.moe_layers():
        layer.experts.slice_experts(2, 2)
    part.initialize(0)
    for one, other in zip(whole.moe_layers(), part.moe_layers(), strict=True):
        assert torch.equal(one.experts.w_in[2:], other.experts.w_in)
        assert torch.equal(one.experts.w_out[2:], other.experts.w_out)


@pytest.mark.parametrize("tied", [True, False])
def test_standard_deviations(tied):
    model = Transformer(
        ModelConfig(dim=128, layers=8, moe_every=2, tie_embeddings=tied), SHARED, 512
    )
    for name, weight in weights(model).items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith(("w_out", "w_out.weight")) else 0.02
            assert weight.std() == pytest.approx(expected, rel=0.12), name


def test_no_two_weights_are_the_same_draw():
    firsts = [
        round(weight.flatten()[0].item(), 9)
        for weight in weights(small(SHARED)).values()
        if weight.dim() > 1
    ]
    assert len(set(firsts)) == len(firsts)
