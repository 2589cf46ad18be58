"""Experts of different shape: outputs, costs, and the layer as their weighted sum."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe import MoE
from dmoe.config.schema import BalanceConfig, CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.moe.experts import HeterogeneousExperts, MLPExperts
from dmoe.moe.layer import MoEOutput
from dmoe.moe.routing import TokenContext
from dmoe.verify.naive.layer import forward as naive_forward
from tests.moe.layers import DIM, close, objective, tokens_of
from tests.references.experts import mixed_reference

SHAPES = [[], [5], [4, 3], [5], [], [2, 2, 2]]
COUNTS = [[3, 0, 5, 1, 2, 2], [0, 0, 0, 0, 0, 9], [0] * 6]


def mixed(kind: str = "swiglu", out_dim: int = 7) -> HeterogeneousExperts:
    experts = HeterogeneousExperts(kind, DIM, SHAPES, out_dim).double()
    experts.initialize(1, 0, 0.7, 0.9)
    return experts


def draw(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(
        rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


def results(experts: HeterogeneousExperts, rows: Tensor, out: Tensor) -> list[Tensor | None]:
    out.sin().sum().backward()
    return [out.detach(), rows.grad, *(parameter.grad for parameter in experts.parameters())]


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu", "relu"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("empty", [0, 2])
def test_equal_one_row_at_a_time(kind: str, counts: list[int], empty: int) -> None:
    """Rows are ordered by physical expert; unused physical experts have no rows."""
    fast, slow = mixed(kind), mixed(kind)
    assert fast.owned == (0, 4, 1, 3, 2, 5)
    placed = [counts[e] for e in fast.owned]
    expert_R = [e for e, count in zip(fast.owned, placed, strict=True) for _ in range(count)]
    rows = draw(sum(counts)), draw(sum(counts))
    got = results(fast, rows[0], fast(rows[0], torch.tensor(placed + [0] * empty)))
    nothing = sum((0 * parameter.sum() for parameter in slow.parameters()), 0 * rows[1].sum())
    expected = results(slow, rows[1], mixed_reference(slow, rows[1], expert_R) + nothing)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine is not None
        close(mine, theirs, 1e-11)


@pytest.mark.parametrize(("each", "empty"), itertools.product([0, 1, 4], [0, 1]))
def test_equal_groups_equal_counts(each: int, empty: int) -> None:
    """The padded exchange gives one number of rows, for unused physical experts too: zeros."""
    experts = mixed()
    experts.shard(experts.placement(2), 1)
    places = len(experts.owned) + empty
    rows = torch.cat(
        [
            draw(each * len(experts.owned)).detach(),
            torch.zeros(each * empty, DIM, dtype=torch.float64),
        ]
    )
    out = experts(rows, each)
    counts = torch.tensor([each] * len(experts.owned) + [0] * empty)
    close(out[: each * len(experts.owned)], experts(rows[: each * len(experts.owned)], counts))
    assert out.shape == (each * places, 7)
    assert not out[each * len(experts.owned) :].any()


def test_of_one_shape_they_are_the_uniform_ones() -> None:
    """The same weights from the same keys, and the same numbers."""
    uniform, same = (
        MLPExperts("swiglu", DIM, 5, 4, DIM).double(),
        HeterogeneousExperts("swiglu", DIM, [[5]] * 4, DIM).double(),
    )
    uniform.initialize(3, 2, 0.5, 0.4)
    same.initialize(3, 2, 0.5, 0.4)
    counts = torch.tensor([2, 0, 3, 1])
    assert torch.equal(uniform(draw(6), counts), same(draw(6), counts))
    assert uniform.multiply_adds == same.multiply_adds == (DIM * 10 + 5 * DIM,) * 4


def test_a_rank_draws_the_weights_that_one_process_draws() -> None:
    whole = mixed()
    for rank in range(3):
        part = HeterogeneousExperts("swiglu", DIM, SHAPES, 7).double()
        part.shard(part.placement(3), rank)
        part.initialize(1, 0, 0.7, 0.9)
        own = dict(whole.named_parameters())
        assert {name.split(".")[0] for name, _ in part.named_parameters()} == set(
            map(str, part.owned)
        )
        assert all(torch.equal(parameter, own[name]) for name, parameter in part.named_parameters())


def test_cost_is_the_share_of_the_multiply_adds() -> None:
    """Issue's example: linear 100 -> 10, 100 -> 50 -> 10, 100 -> 64 -> 32 -> 10."""
    experts = HeterogeneousExperts("relu", 100, [[], [50], [64, 32]], 10)
    assert experts.multiply_adds == (1000, 5000 + 500, 6400 + 2048 + 320)
    assert experts.flops == tuple(2 * number for number in experts.multiply_adds)
    assert sum(experts.cost) == pytest.approx(1.0)
    assert experts.multiply_adds[2] == sum(
        w.numel() for name, w in experts.named_parameters() if name.startswith("2.")
    )


def layer_of(kind: str = "budget", **options: Any) -> MoE:
    router = RouterConfig(
        kind=kind, renormalize=False, **({"budget": 0.5} if kind == "budget" else {})
    )  # type: ignore[arg-type]
    experts = ExpertsConfig(kind="gelu", shapes=SHAPES, zero=1, copy=1, constant=2)
    layer = MoE(DIM, 1, 6, 4, router=router, experts=experts, **options).double()
    layer.initialize(0, std=0.6, out_std=0.8)
    return layer


def naive(layer: MoE, x: Tensor, output: MoEOutput) -> Tensor:
    """The sum over kept choices, each computed alone."""
    module, rows = layer.zero_cost, []
    assert module is not None
    for t, token in enumerate(x.flatten(0, -2)):
        y = torch.zeros(DIM, dtype=token.dtype)
        for k, e in enumerate(output.plan.expert_TK[t].tolist()):
            if output.plan.keep_TK is not None and not output.plan.keep_TK[t, k]:
                continue
            if e < 6:
                made = mixed_reference(layer.experts, token.unsqueeze(0), [e])[0]  # type: ignore[arg-type]
            else:
                vectors = module.constant_JM
                assert vectors is not None
                made = [torch.zeros_like(token), token, vectors[0], vectors[1]][e - 6]
            y = y + output.plan.weight_TK[t, k] * made
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("kind", ["budget", "top_k", "noisy", "adaptive"])
@pytest.mark.parametrize(
    ("factor", "exchange"), [(None, "packed"), (0.6, "packed"), (0.6, "padded")]
)
def test_the_layer_is_the_weighted_sum(kind: str, factor: float | None, exchange: str) -> None:
    from tests.moe.routers.cases import known

    layer, x = (
        layer_of(kind, capacity=CapacityConfig(factor=factor), exchange=exchange),
        tokens_of(2, 9),
    )
    output = layer(x, known(18))
    close(output.y, naive(layer, x, output))
    objective(output).backward()
    got = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"x": x.grad}
    layer.zero_grad()
    x.grad = None
    again = layer(x, known(18))
    objective(
        MoEOutput(naive(layer, x, again), again.aux, again.stats, again.routing, again.plan)
    ).backward()
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        assert got[name] is not None, name
        close(got[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def test_what_costs_nothing_is_never_dropped_and_counts_for_balance() -> None:
    layer, x = layer_of(capacity=CapacityConfig(factor=0.05)), tokens_of(2, 20)
    output = layer(x)
    chosen, kept = output.stats.choice_E, output.stats.kept_E
    assert kept[:6].sum() < chosen[:6].sum(), "no real expert overflowed: the test shows nothing"
    assert torch.equal(kept[6:], chosen[6:])
    assert chosen[6:].sum() > 0
    assert output.stats.slots == 6 * output.plan.slots.capacity


def test_a_call_can_give_another_budget_and_says_what_it_did() -> None:
    layer, x = layer_of(), tokens_of(3, 4)
    spent = [
        layer(x, compute_budget=budget).compute_usage.cost_T for budget in (0.0, 0.2, 0.5, 1.0)
    ]
    for budget, cost_T in zip((0.0, 0.2, 0.5, 1.0), spent, strict=True):
        assert float(cost_T.max()) <= budget + 1e-9
    assert float(spent[3].mean()) > float(spent[1].mean()) > 0 == float(spent[0].sum())
    usage = layer(x, compute_budget=0.2).compute_usage
    assert float(usage.usage_E.sum()) > 0
    words = [usage.of_token(t) for t in range(12)]
    assert any("of the budget was left" in line for line in words)
    assert any("taken" in line for line in words)
    assert all(f"Spent {float(spent[1][t]):.3f} of 0.200" in line for t, line in enumerate(words))
    assert "copy" in str(usage)


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match=r"router.kind=top_k has no budget"):
        MoE(DIM, 4, 4, 2)(tokens_of(2, 3), compute_budget=0.5)
    with pytest.raises(ValueError, match=r"compute_budget=1.5: must be from 0 to 1"):
        layer_of()(tokens_of(2, 3), compute_budget=1.5)
    with pytest.raises(ValueError, match="no output of width 9"):
        MoE(DIM, 4, 4, 2, out_dim=9, experts=ExpertsConfig(copy=1))
    with pytest.raises(
        ValueError, match=r"^num_experts=4: must be the number of experts.shapes, 6"
    ):
        MoE(DIM, 4, 4, 2, experts=ExpertsConfig(shapes=SHAPES))


@pytest.mark.parametrize(
    "layer",
    [
        MoE(DIM, 4, 4, 3, router=RouterConfig(kind="budget", renormalize=False, min_weight=0.9)),
        MoE(DIM, 4, 4, 4, router=RouterConfig(kind="noisy"), balance=BalanceConfig(load=0.1)),
    ],
    ids=["nothing is heavy enough", "a noisy router that takes all"],
)
def test_the_naive_layer_knows_the_corners(layer: MoE) -> None:
    """The naive layer handles tokens without experts (budget), and the load loss with K = E."""
    layer, x = layer.double(), tokens_of(2, 5)
    context = TokenContext(noise_key=(0, 1))
    got, expected = layer(x, context), naive_forward(layer, x, context)
    close(got.y, expected.y)
    assert got.aux.keys() == expected.aux.keys()
    for name, loss in expected.aux.items():
        close(got.aux[name], loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("factor", "exchange"), [(None, "packed"), (0.7, "padded")])
def test_narrow_numbers_and_no_tokens(
    dtype: torch.dtype, factor: float | None, exchange: str
) -> None:
    """Output and gradients have the model's dtype; without tokens, gradients are zero."""
    layer = layer_of(capacity=CapacityConfig(factor=factor), exchange=exchange).to(dtype)
    for shape in ((3, 4, DIM), (0, 4, DIM), (0, DIM)):
        layer.zero_grad()
        output = layer(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        assert output.y.dtype == dtype
        assert output.y.shape == shape
        (output.y.float().sum() + sum(loss.float() for loss in output.aux.values())).backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all()
            assert len(output.y) or not parameter.grad.any(), name
        assert "of the cost of all experts" in str(output.compute_usage)
