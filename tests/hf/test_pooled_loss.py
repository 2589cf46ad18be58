"""The auxiliary loss of transformers by dmoe's record of a forward."""

from __future__ import annotations

import pytest
import torch

import dmoe
from dmoe.config.schema import BalanceConfig
from dmoe.hf import pooled_auxiliary_loss
from tests.hf.families import tiny
from tests.hf.tiny_hf import tokens


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("padding", [0, 5])
def test_it_is_the_loss_of_transformers_with_its_gradient(family: str, padding: int) -> None:
    plain, model = tiny(family), dmoe.moefy(tiny(family))
    mask = torch.ones_like(tokens())
    mask[0, 16 - padding :] = 0
    theirs = plain(
        input_ids=tokens(), attention_mask=mask, output_router_logits=True, use_cache=False
    ).aux_loss
    model(input_ids=tokens(), attention_mask=mask, use_cache=False)
    ours = pooled_auxiliary_loss(model)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    theirs.backward()
    ours.backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert any("router" in n or "gate" in n for n in grads)
    for name, parameter in model.named_parameters():
        if name in grads and parameter.grad is not None:
            assert (parameter.grad - grads[name]).abs().max() < 1e-6, name


def test_it_is_trained_by_name() -> None:
    """`balance.pooled` gives the loss that transformers trains with output_router_logits=True."""
    plain = tiny("mixtral", router_aux_loss_coef=0.05)
    model = dmoe.moefy(tiny("mixtral"), balance=BalanceConfig(switch=0.0, z=0.0, pooled=0.05))
    asked = {"input_ids": tokens(), "labels": tokens(), "use_cache": False}
    theirs, ours = plain(**asked, output_router_logits=True).loss, model(**asked).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    theirs.backward()
    ours.backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            assert other.grad is not None
            assert (one.grad - other.grad).abs().max() < 1e-6, name


def test_it_needs_a_forward() -> None:
    with pytest.raises(dmoe.ConfigError, match="has run no forward"):
        pooled_auxiliary_loss(dmoe.moefy(tiny("mixtral")))
