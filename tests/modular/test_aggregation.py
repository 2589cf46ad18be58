"""Aggregations against their formulas, one token at a time."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from dmoe.modular import (
    AGGREGATIONS,
    BANKS,
    adapter_context,
    adapter_layers,
    attach,
    constant,
    routed,
    table,
)
from dmoe.modular.aggregation import Attention, Concat, Gated, Mean
from dmoe.modular.aggregation.fixed import sequence_weights
from dmoe.moe.capacity import dropless_plan
from dmoe.moe.routing import BatchShape, TokenContext
from dmoe.verify.naive.adapters import contribution_reference
from tests.modular.nets import D, M, O, drawn, randomize

ROUTERS = {
    "top_k": routed("top_k", M, 2),
    "sigmoid": routed("top_k", M, 3, score="sigmoid", renormalize=False),
    "soft": routed("soft", M, M),
    "sequence": routed("top_k", M, 2, per="sequence"),
    "table": table([[0], [3, 1], [2]], M),
    "constant": constant(0.1, 0.4, 0.2, 0.3),
}
KNOWN = TokenContext(
    label_T=torch.tensor([0, 1, 2, 1, 1, 0, 2, 2]),
    valid_T=torch.tensor([True, True, True, False, True, True, False, True]),
)
OPTIONS = {"low_rank": {"rank": 3}, "adapter": {"hidden": 3}, "scale": {}}


def allowed(kind: str, aggregation: str, router: str) -> bool:
    """Return True for combinations that `attach` accepts (see test_attach)."""
    unused_weights = aggregation in ("mean", "gated") and router not in ("table", "constant")
    return not unused_weights and not (aggregation == "stacked" and kind == "low_rank")


TRIPLES = [
    triple
    for triple in product(sorted(OPTIONS), sorted(AGGREGATIONS), sorted(ROUTERS))
    if allowed(*triple)
]


@pytest.mark.parametrize(("kind", "aggregation", "router"), TRIPLES)
def test_each_aggregation_equals_one_token_at_a_time(
    kind: str, aggregation: str, router: str
) -> None:
    linear = nn.Linear(D, O).double()
    layer = attach(
        linear,
        "",
        partial(BANKS[kind], M, **OPTIONS[kind]),
        ROUTERS[router],
        AGGREGATIONS[aggregation],
    )[""]
    randomize(linear)
    results = []
    for fast in (True, False):
        linear.zero_grad()
        x = drawn(2, 4, D).requires_grad_()
        with adapter_context(linear, KNOWN):
            if fast:
                contribution = linear(x) - nn.functional.linear(x, linear.weight, linear.bias)
            else:
                y = nn.functional.linear(x, linear.weight, linear.bias)
                rows = (x if layer.experts.input_kind == "input" else y).flatten(0, 1)
                routing = layer.router(rows, layer.per_token_context(2, 8), BatchShape(2))
                plan = dropless_plan(routing)
                contribution = contribution_reference(layer, rows, rows, plan, 2).view(2, 4, O)
        (contribution.sin().sum() + 0 * sum(p.sum() for p in linear.parameters())).backward()
        results.append(
            {
                "y": contribution,
                "x": x.grad,
                **{name: p.grad for name, p in linear.named_parameters()},
            }
        )
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(
            results[0][name],
            expected,
            rtol=1e-9,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("aggregation", [Concat, Attention, Gated, Mean])
def test_padding_gets_nothing_and_gives_no_nan(aggregation: type[nn.Module]) -> None:
    linear = nn.Linear(D, O).double()
    attach(linear, "", partial(BANKS["low_rank"], M), ROUTERS["table"], aggregation)
    randomize(linear)
    x = drawn(2, 4, D).requires_grad_()
    with adapter_context(linear, KNOWN):
        contribution = (linear(x) - nn.functional.linear(x, linear.weight, linear.bias)).flatten(
            0, 1
        )
    contribution.sum().backward()
    assert not contribution[~KNOWN.valid_T].any()
    assert contribution[KNOWN.valid_T].any(1).all()
    assert all(p.grad.isfinite().all() for p in linear.parameters() if p.grad is not None)


def test_gated_fusion_of_two_choices_is_a_sigmoid_gate() -> None:
    """y = g a + (1 - g) b, g = sigmoid([a | b] G + c) must equal the softmax over two."""
    linear = nn.Linear(D, O).double()
    layer = attach(linear, "", partial(BANKS["low_rank"], 2), constant(1.0, 1.0), Gated)[""]
    randomize(linear)
    x = drawn(5, D)
    plan = dropless_plan(layer.router(x, TokenContext()))
    a, b = layer.per_choice_outputs(x, plan).unbind(1)
    gate = torch.sigmoid(torch.cat([a, b], 1) @ layer.aggregation.gate + layer.aggregation.bias)
    expected = gate * a + (1 - gate) * b
    torch.testing.assert_close(
        linear(x) - nn.functional.linear(x, linear.weight, linear.bias), expected
    )


def test_new_aggregations_are_sum_and_mean() -> None:
    """Before training, concatenation is the weighted sum and the gate is the mean."""
    for fresh, plain in (("concat", "weighted_sum"), ("gated", "mean")):
        outputs = []
        for name in (fresh, plain):
            linear = nn.Linear(D, O).double()
            with torch.no_grad():
                linear.weight.copy_(drawn(O, D, seed=4)), linear.bias.zero_()
            attach(
                linear,
                "",
                partial(BANKS["low_rank"], M),
                constant(0.1, 0.2, 0.3, 0.4),
                AGGREGATIONS[name],
            )
            with torch.no_grad():
                adapter_layers(linear)[""].experts.b.copy_(drawn(M, 8, O, seed=5))
            outputs.append(linear(drawn(3, D)))
        torch.testing.assert_close(*outputs)


def test_a_sequence_has_the_mean_weights_of_its_routed_tokens() -> None:
    """The reference above uses the tested function, so these weights have a loop of their own."""
    router = ROUTERS["top_k"](D, 0).double()
    router.initialize(0, 0, 1.0)
    routing = router(drawn(8, D), KNOWN)
    for b in range(2):
        tokens = [t for t in range(4 * b, 4 * b + 4) if bool(KNOWN.valid_T[t])]
        totals = [0.0] * M
        for t in tokens:
            for module, weight in zip(
                routing.expert_TK[t].tolist(), routing.weight_TK[t].tolist(), strict=True
            ):
                totals[module] += weight / len(tokens)
        assert sequence_weights(dropless_plan(routing), 2)[b].tolist() == pytest.approx(totals)
