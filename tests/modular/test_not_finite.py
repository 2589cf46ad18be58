"""What padding holds reaches no module, router or aggregation; see tests/moe/test_not_finite.py.

`ParameterMean` multiplied its output by a mask, and every aggregation with a matrix of its own
multiplied a zero gradient by what padding held.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dmoe.modular import AGGREGATIONS, BANKS, adapter_context, attach
from dmoe.moe.routing import TokenContext
from tests.models.small import batch, small
from tests.modular.nets import D, M, O, drawn, randomize
from tests.modular.test_aggregation import KNOWN, OPTIONS, ROUTERS, TRIPLES
from tests.moe.strategies import drawn as settings
from tests.moe.test_not_finite import poisons, same


@settings
@given(triple=st.sampled_from(TRIPLES), poison=poisons)
def test_padding_reaches_no_module(triple: tuple[str, str, str], poison: float) -> None:
    kind, aggregation, router = triple
    assert KNOWN.valid_T is not None
    valid_BS = KNOWN.valid_T.view(2, 4)
    results = []
    for value in (0.5, poison):
        target = nn.Linear(D, O).double()
        torch.nn.init.constant_(target.weight, 0.1)
        torch.nn.init.zeros_(target.bias)
        attach(
            target,
            "",
            partial(BANKS[kind], M, **OPTIONS[kind]),
            ROUTERS[router],
            AGGREGATIONS[aggregation],
        )
        randomize(target)
        x = drawn(2, 4, D)
        x[~valid_BS] = value
        with adapter_context(target, KNOWN):
            y = target(x)
        y.backward(torch.ones_like(y).masked_fill(~valid_BS.unsqueeze(-1), value))
        grads = {
            name: parameter.grad
            for name, parameter in target.named_parameters()
            if parameter.grad is not None and name not in ("weight", "bias")
        }
        results.append(grads | {"y": y[valid_BS]})
    same(*results)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 65504.0])
def test_padding_reaches_no_token_of_a_transformer(poison: float) -> None:
    """Attention weighs a later position by 0, and 0 x NaN is NaN: its embedding is set to zero."""
    token, target = batch(2, 6)
    token = token % 30
    valid_BS = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    token[~valid_BS] = 36  # a row of the table that only padding has
    target[~valid_BS] = -100
    results = []
    for value in (0.5, poison):
        model = small()
        with torch.no_grad():
            model.embedding.weight[36] = value
        out = model(token, target, TokenContext(valid_T=valid_BS), return_logits=True)
        assert out.loss_sum is not None
        assert out.logits is not None
        out.loss_sum.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(grads | {"loss": out.loss_sum, "logits": out.logits[valid_BS]})
    same(*results)
