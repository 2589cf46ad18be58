"""Counts beyond what small number formats hold are exact.

`dmoe verify` counts a few hundred assignments. Counts added in bfloat16 are exact to 256, in fp16 to
2,048 (and infinite above 65,504), in int16 to 32,767, in uint16 to 65,535: with any of these the
balancing of a real run is wrong and every comparison of small runs is equal. Two such errors were
put into the code by hand, and nothing was red.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe.config.schema import BalanceConfig, CapacityConfig, RouterConfig
from dmoe.models.base import ModelOutput
from dmoe.moe.layer import MoE, MoEOutput
from dmoe.moe.load_balancing import updated_bias
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext
from dmoe.train.reduction import BatchCounts, Requests, pack, unpack

LARGE = [257, 2_049, 32_769, 65_537, 2**24 + 1]
"""One more than bfloat16, fp16, int16, uint16 and float32 count."""


def stats(choices: list[int], kept: list[int]) -> LayerStats:
    zero = torch.zeros(())
    return LayerStats(torch.tensor(choices), torch.tensor(kept), zero, zero, torch.tensor(0), 0.0)


@pytest.mark.parametrize("count", LARGE)
def test_the_control_reduction_keeps_every_count(count: int) -> None:
    """Counts pass through one vector; a vector of fp16 lost those above 2,048."""
    outputs = [ModelOutput(None, torch.zeros(()), [{}], [stats([count, 1], [count, 0])])] * 3
    vector = pack(torch.zeros(2), outputs, BatchCounts(0, 0), Requests())
    layer = unpack(vector.tolist(), outputs[0]).layers[0]
    assert layer.choice_counts == [3 * count, 3]
    assert layer.kept_counts == [3 * count, 0]


def forward_to_one_expert(tokens: int, factor: float | None, dtype: torch.dtype) -> MoEOutput:
    """Route all tokens to expert 1 of 2, and all but three of them there by choice."""
    layer = MoE(
        2,
        2,
        2,
        1,
        router=RouterConfig(renormalize=False),
        capacity=CapacityConfig(factor=factor),
        balance=BalanceConfig(switch=0.1, switch_level="global"),
    )
    with torch.no_grad():
        layer.router.get_parameter("weight").copy_(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]))
        x_TD = torch.ones(tokens, 2, dtype=dtype)
        x_TD[:3] = -1.0
        prior_LE = torch.tensor([[65_537, 1]])
        output: MoEOutput = layer(x_TD, TokenContext(prior_count_LE=prior_LE))
    return output


@pytest.mark.parametrize("tokens", [260, 2_052, 65_540])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_counts_exactly(tokens: int, dtype: torch.dtype) -> None:
    """Counts of a forward in bf16 stopped at 256, where 256 + 1 is 256."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = forward_to_one_expert(tokens, None, dtype)
    assert output.stats.choice_E.tolist() == [3, tokens - 3]
    assert output.stats.kept_E.tolist() == [3, tokens - 3]
    assert output.stats.as_vector()[:4].tolist() == [3, tokens - 3, 3, tokens - 3]


@pytest.mark.parametrize("tokens", [600, 70_000])
def test_a_queue_counts_exactly(tokens: int) -> None:
    """The position of the last token in a queue decides if it is kept."""
    output = forward_to_one_expert(tokens, 1.0, torch.float32)
    assert output.stats.kept_E.tolist() == [3, tokens // 2]
    assert output.plan.slots is not None
    kept_T = output.plan.is_kept_TK[:, 0]
    assert kept_T.nonzero().max() == tokens // 2 + 2


@pytest.mark.parametrize("tokens", [260, 2_052, 65_540])
def test_the_shares_of_the_switch_loss_are_exact(tokens: int) -> None:
    """Shares come from the counts of this and the earlier accumulation steps together."""
    output = forward_to_one_expert(tokens, None, torch.float32)
    prior = torch.tensor([65_537, 1], dtype=torch.float64)
    count_E = prior + torch.tensor([3, tokens - 3], dtype=torch.float64)
    mean_E = output.routing.score_TE.double().mean(0)
    expected = 2 * (count_E / count_E.sum() * mean_E).sum()
    torch.testing.assert_close(output.aux["switch"].double(), expected, rtol=1e-6, atol=0)


def direction(counts: list[int]) -> Tensor:
    return updated_bias(torch.zeros(len(counts)), torch.tensor(counts), 1.0, recenter=False)


@pytest.mark.parametrize("count", LARGE)
def test_the_bias_sees_a_difference_of_one(count: int) -> None:
    assert direction([count, count + 1]).tolist() == [1.0, -1.0]
    assert direction([count, count]).tolist() == [0.0, 0.0]
