"""Given choices in the routers of all families: the router's own weights for other experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.hf import forward_of
from dmoe.moe.routing import TokenContext
from dmoe.verify.published import float32_is_float64
from tests.hf.families import FAMILIES, tiny
from tests.hf.tiny_hf import tokens

WITHOUT_TOPK = ("phimoe", "deepseek_v4")
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mixtral": lambda every, given: given.exp() / given.exp().sum(1, keepdim=True),
    "gpt_oss": lambda every, given: given.exp() / given.exp().sum(1, keepdim=True),
    "olmoe": lambda every, given: given.exp() / every.exp().sum(1, keepdim=True),
    "longcat_flash": lambda every, given: 6 * given.exp() / every.exp().sum(1, keepdim=True),
    "glm4_moe": lambda every, given: (
        1.5 * given.sigmoid() / (given.sigmoid().sum(1, keepdim=True) + 1e-20)
    ),
}
"""The weights by the papers' formulas, from the logits of all experts and of the given ones."""


def run(model: Any, given_LTK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, choices [L, T, K] and weights, after a backward."""
    record = forward_of(model)
    record.begin(TokenContext(given_expert_LTK=given_LTK), 4, model)
    with float32_is_float64():
        out = model(input_ids=tokens(), labels=tokens(), use_cache=False)
        model.zero_grad()
        out.loss.backward()
    routings = [layer.routing for layer in record.layers]
    return (
        out.logits.detach(),
        torch.stack([routing.expert_TK for routing in routings]),
        torch.stack([routing.weight_TK.detach() for routing in routings]),
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_TOPK])
def test_a_router_weighs_given_experts_by_its_own_formula(family: str) -> None:
    """Its own choice, given, changes nothing; another one gets the weights of its formula."""
    model = dmoe.moefy(tiny(family))
    logits, chosen_LTK, _ = run(model)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    again, same_LTK, _ = run(model, chosen_LTK)
    assert torch.equal(again, logits)
    assert torch.equal(same_LTK, chosen_LTK)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, before[name]), name
    other_LTK = (chosen_LTK + 1) % forward_of(model).layers[0].routing.num_experts
    other, found_LTK, weight_LTK = run(model, other_LTK)
    assert torch.equal(found_LTK, other_LTK)
    assert not torch.equal(other, logits)
    if family in FORMULAS:
        routings = [layer.routing for layer in forward_of(model).layers]
        for routing, weight_TK in zip(routings, weight_LTK, strict=True):
            logit_TK = routing.logit_TE.detach().gather(1, routing.expert_TK)
            expected_TK = FORMULAS[family](routing.logit_TE.detach(), logit_TK)
            assert (weight_TK - expected_TK).abs().max() < 1e-12


@pytest.mark.parametrize("family", WITHOUT_TOPK)
def test_a_router_without_topk_is_refused(family: str) -> None:
    """Phi's masks in rounds, DeepSeek-V4's hashes the ids of tokens in its first layers."""
    model = dmoe.moefy(tiny(family))
    _, chosen_LTK, _ = run(model)
    with pytest.raises(ConfigError, match="needs a router that chooses by topk"):
        run(model, chosen_LTK)
