"""Shapes, widths and precisions the layer takes, and its initialisation."""

from __future__ import annotations

import pytest
import torch

from dmoe import MoE
from dmoe.config.schema import CapacityConfig, ExpertsConfig, MoEConfig
from tests.moe.layers import DIM, close, gradients, make, tokens_of
from tests.moe.naive import feed_forward


@pytest.mark.parametrize("shape", [(1,), (12,), (3, 4), (1, 1), (2, 3, 2), (2, 1, 2, 3)])
@pytest.mark.parametrize("out_dim", [None, 3, 11])
def test_any_leading_shape_and_output_width(shape: tuple[int, ...], out_dim: int | None) -> None:
    layer = make(out_dim=out_dim)
    x = tokens_of(*shape)
    y = layer(x).y
    assert y.shape == (*shape, out_dim or DIM)
    close(y.flatten(0, -2), layer(x.flatten(0, -2)).y)


def test_a_view_that_is_not_contiguous() -> None:
    layer = make()
    x = tokens_of(4, 3)
    close(layer(x.transpose(0, 1)).y, layer(x).y.transpose(0, 1))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
@pytest.mark.parametrize(
    ("exchange", "factor"), [("packed", None), ("packed", 1.0), ("padded", 1.0)]
)
def test_no_tokens(shape: tuple[int, ...], exchange: str, factor: float | None) -> None:
    """A rank without tokens runs forward and backward; every gradient exists and is zero."""
    layer = make(
        capacity=CapacityConfig(factor=factor), exchange=exchange, experts=ExpertsConfig(shared=1)
    )
    output, gradient = gradients(layer, tokens_of(*shape))
    assert output.y.shape == (*shape, DIM)
    assert all(not g.any() for g in gradient.values())


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu", "relu"])
def test_shared_experts_equal_a_loop_over_them(kind: str) -> None:
    """One wide feed-forward of n*F is the sum of n experts of F."""
    count, hidden = 3, 5
    layer = make(experts=ExpertsConfig(kind=kind, shared=count, shared_dim=hidden))  # type: ignore[arg-type]
    assert layer.shared is not None
    x_TD = tokens_of(7)
    halves = layer.shared.w_in.weight.t().chunk(2 if kind in ("swiglu", "geglu") else 1, dim=1)
    w_out = layer.shared.w_out.weight.t()
    expected = torch.zeros(7, DIM, dtype=torch.float64)
    for n in range(count):
        part = slice(n * hidden, (n + 1) * hidden)
        w_in = torch.cat([half[:, part] for half in halves], 1)
        expected += torch.stack([feed_forward(kind, x, w_in, w_out[part]) for x in x_TD])
    close(layer.shared(x_TD), expected)
    close(layer(x_TD).y - make(experts=ExpertsConfig(kind=kind))(x_TD).y, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_bf16_is_the_float64_layer_rounded(exchange: str) -> None:
    layer = make(capacity=CapacityConfig(factor=2.0), exchange=exchange).bfloat16()
    x = tokens_of(40, dtype=torch.bfloat16)
    output, gradient = gradients(layer, x)
    assert output.y.dtype == torch.bfloat16
    assert output.aux["switch"].dtype == torch.float32
    exact_x = x.detach().double().requires_grad_()
    exact, exact_gradient = gradients(layer.double(), exact_x)
    assert torch.equal(output.plan.expert_TK, exact.routing.expert_TK)
    for name, got in [("y", output.y), *gradient.items()]:
        expected = exact.y if name == "y" else exact_gradient[name]
        error = float((got.double() - expected).norm() / expected.norm())
        assert error < 0.015, (name, error)


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_autocast_computes_experts_in_bf16_and_keeps_float32_masters(exchange: str) -> None:
    layer = make(
        capacity=CapacityConfig(factor=2.0), exchange=exchange, experts=ExpertsConfig(shared=1)
    ).float()
    x = tokens_of(40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradient = gradients(layer, x)
    plain, gradient_plain = gradients(layer, x)
    assert output.y.dtype == torch.bfloat16
    assert torch.equal(
        output.routing.logit_TE, plain.routing.logit_TE
    )  # the router does not follow autocast
    assert {g.dtype for g in gradient.values()} == {torch.float32}
    for name, got in [("y", output.y.float()), *gradient.items()]:
        expected = plain.y if name == "y" else gradient_plain[name]
        error = float((got - expected).norm() / expected.norm())
        assert 0 < error < 0.02, (name, error)


def test_weights_depend_on_the_key_alone() -> None:
    """Neither on the order of construction nor on the state of the global generator."""
    torch.manual_seed(1)
    first = [make_plain(layer) for layer in (0, 1)]
    torch.manual_seed(2)
    second = [make_plain(layer) for layer in (1, 0)][::-1]
    for one, two in zip(first, second, strict=True):
        assert state_equal(one, two)
    assert not state_equal(first[0], first[1])
    assert not state_equal(first[0], make_plain(0, seed=8))


def make_plain(layer: int, seed: int = 7) -> MoE:
    return MoE(DIM, 4, 6, 2, layer=layer, seed=seed, experts=ExpertsConfig(shared=1))


def state_equal(one: MoE, two: MoE) -> bool:
    return all(
        torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items()
    )


def test_no_two_experts_start_alike() -> None:
    experts = make_plain(0).experts
    for weight in (experts.w_in, experts.w_out):
        flat = weight.detach().flatten(1)
        assert len(torch.unique(flat, dim=0)) == 6
        assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 0.6


@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 3), (5, 1)])
@pytest.mark.parametrize("again", [False, True])
def test_a_shard_is_a_slice_of_the_whole(first: int, count: int, again: bool) -> None:
    whole, part = make_plain(0), make_plain(0)
    part.experts.slice_experts(first, count)
    if again:  # drawn on the rank that owns them, as after a start on the meta device
        with torch.no_grad():
            for parameter in part.experts.parameters():
                parameter.zero_()
        part.initialize(7)
    for name in ("w_in", "w_out"):
        assert torch.equal(
            getattr(part.experts, name), getattr(whole.experts, name)[first : first + count]
        )


def test_from_config_passes_everything_on() -> None:
    config = MoEConfig(
        num_experts=5, top_k=3, expert_dim=4, capacity=CapacityConfig(factor=0.8), exchange="padded"
    )
    layer = MoE.from_config(config, DIM, virtual_ranks=2, layer=3)
    direct = MoE(
        DIM, 4, 5, 3, capacity=config.capacity, exchange="padded", virtual_ranks=2, layer=3
    )
    x = tokens_of(4, 3, dtype=torch.float32)
    assert torch.equal(layer(x).y, direct(x).y)
    assert torch.equal(layer(x).stats.as_vector(), direct(x).stats.as_vector())
    assert layer.padded is not None
