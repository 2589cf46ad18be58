"""The layer against an independent loop over tokens: output, losses, drops, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe import MoE
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.moe.layer import MoEOutput
from dmoe.moe.routing import TokenContext
from tests.moe.layers import close, gradients, make, objective, tokens_of
from tests.moe.naive import NaiveOutput, naive_moe

TOKENS = 18
VALID = [t % 5 != 3 for t in range(TOKENS)]
CASES: dict[str, dict[str, Any]] = {
    "dropless": {},
    "switch": {
        "experts_per_token": 1,
        "router": RouterConfig(renormalize=False),
        "capacity": CapacityConfig(factor=1.0),
    },
    "gshard": {"capacity": CapacityConfig(factor=0.8)},
    "by score": {"capacity": CapacityConfig(factor=0.6, priority="score")},
    "deepspeed": {
        "capacity": CapacityConfig(factor=0.5, renormalize=True),
        "router": RouterConfig(scale=1.7),
    },
    "megatron": {
        "router": RouterConfig(weights_from="chosen", renormalize=False),
        "experts_per_token": 3,
    },
    "deepseek": {
        "router": RouterConfig(score="sigmoid", scale=2.5),
        "experts": ExpertsConfig(shared=2),
        "experts_per_token": 3,
    },
    "sigmoid, dropped": {
        "router": RouterConfig(score="sigmoid", renormalize=False),
        "capacity": CapacityConfig(factor=0.7),
    },
    "every expert": {"experts_per_token": 5, "capacity": CapacityConfig(factor=0.5)},
    "one expert": {
        "num_experts": 1,
        "experts_per_token": 1,
        "router": RouterConfig(renormalize=False),
    },
    "geglu": {"experts": ExpertsConfig(kind="geglu", shared=1, shared_dim=3)},
    "gelu": {"experts": ExpertsConfig(kind="gelu")},
    "relu, other width": {"experts": ExpertsConfig(kind="relu"), "out_dim": 9},
    "nearly all dropped": {"capacity": CapacityConfig(factor=0.01)},
}
BOTH_EXCHANGES = [
    (name, exchange)
    for name, case in CASES.items()
    for exchange in ("packed", "padded")
    if exchange == "packed" or "capacity" in case
]


def naive_gradients(
    layer: MoE, x: Tensor, valid: list[bool] | None
) -> tuple[NaiveOutput, dict[str, Tensor]]:
    layer.zero_grad()
    x.grad = None
    naive = naive_moe(layer, x, valid=valid)
    as_output = MoEOutput(naive.y, {"switch": naive.switch, "z": naive.z}, None, None, None)  # type: ignore[arg-type]
    everything = sum((parameter.sum() for parameter in layer.parameters()), x.sum())
    (objective(as_output) + 0 * everything).backward()
    assert x.grad is not None
    return naive, {"x": x.grad.clone()} | {
        name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "exchange"), BOTH_EXCHANGES)
def test_layer_equals_the_loop_over_tokens(name: str, exchange: str, masked: bool) -> None:
    layer = make(exchange=exchange, **CASES[name])
    x = tokens_of(TOKENS)
    valid = VALID if masked else None
    context = TokenContext(valid_T=torch.tensor(VALID)) if masked else TokenContext()

    output, got = gradients(layer, x, context)
    naive, expected = naive_gradients(layer, x, valid)
    assert output.plan.expert_TK.tolist() == naive.chosen
    assert kept_pairs(output) == naive.kept
    close(output.y, naive.y)
    close(output.aux, {"switch": naive.switch, "z": naive.z})
    close(got, expected)


def kept_pairs(output: MoEOutput) -> set[tuple[int, int]]:
    plan = output.plan
    return {(t, int(plan.expert_TK[t, k])) for t, k in plan.is_kept_TK.nonzero().tolist()}


def test_something_is_dropped_in_the_cases_that_mean_to() -> None:
    for name, case in CASES.items():
        stats = make(**case)(tokens_of(TOKENS)).stats
        assert bool((stats.kept_E < stats.choice_E).any()) == ("capacity" in case), name


def test_evaluation_uses_its_own_capacity() -> None:
    layer = make(
        capacity=CapacityConfig(factor=0.5, eval_factor=0.9),
        balance=BalanceConfig(),
        exchange="padded",
    )
    x = tokens_of(TOKENS)
    trained = layer(x)
    evaluated = layer.eval()(x)
    assert kept_pairs(trained) < kept_pairs(evaluated) == naive_moe(layer, x).kept
    dropless = make(capacity=CapacityConfig(factor=0.5), exchange="padded").eval()(x)
    assert int(dropless.stats.kept_E.sum()) == TOKENS * 2


def test_losses_that_are_off_are_absent() -> None:
    assert make(balance=BalanceConfig(switch=0.0, z=0.0))(tokens_of(4)).aux == {}
    assert set(make(balance=BalanceConfig(switch=0.0))(tokens_of(4)).aux) == {"z"}
