"""The CUDA branches of the other layers, by value on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from dmoe import MoE
from dmoe.bench.measure import KernelCounter
from dmoe.config.schema import CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.models.layers import RMSNorm
from dmoe.moe import dispatch
from dmoe.moe.routers.adaptive import until_top_p
from dmoe.moe.routing import TokenContext

CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed with capacity": {"capacity": CapacityConfig(factor=0.75)},
    "padded": {"capacity": CapacityConfig(factor=0.75), "exchange": "padded"},
    "adaptive": {"router": RouterConfig(kind="adaptive", top_p=0.4, renormalize=False)},
    "budget": {"router": RouterConfig(kind="budget", budget=0.4, renormalize=False)},
    "shared": {"experts": ExpertsConfig(shared=1, kind="gelu")},
    "zero": {
        "router": RouterConfig(renormalize=False),
        "experts": ExpertsConfig(zero=1, copy=1, constant=1),
    },
    "mixed": {"experts": ExpertsConfig(shapes=[[16], [12], [20, 8], [12]])},
    "soft": {"router": RouterConfig(kind="soft"), "top_k": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_on_the_branch_of_cuda_computes_what_it_computes_on_the_cpu(
    case: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs, and the gradients of tokens, experts and router, which come from the weights.

    The batches of the products are cut at 7 rows here, at 65,535 on a GPU (pytorch#25241).
    """
    monkeypatch.setattr(dispatch, "MAX_BATCH", 7)
    options = dict(CASES[case])
    layer = MoE(12, 20, 4, options.pop("top_k", 2), **options)
    layer.initialize(0, std=0.5, out_std=0.5)
    start = torch.randn(2, 16, 12)
    results = []
    for branch in ("cpu", "cuda"):
        if branch == "cuda":
            request.getfixturevalue("cuda_branch")
        layer.zero_grad()
        x = start.clone().requires_grad_()
        output = layer(x, TokenContext(noise_key=(0, 0)))
        output.y.sin().sum().backward()
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.abs().sum() > 0
        results.append([output.y, x.grad, *(p.grad for p in layer.parameters())])
    for got, expected in zip(*results, strict=True):
        # the CPU takes the weights' gradient from hidden rows, in another order of sums
        atol = 1e-5 * max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=atol)


@pytest.mark.usefixtures("cuda_branch")
def test_no_row_at_all_has_weights_with_a_zero_gradient() -> None:
    plan = {"keep_TK": torch.zeros(3, 2, dtype=torch.bool), "filled_R": None}
    permutation = dispatch.Permutation(
        torch.empty(0, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), **plan
    )
    rows, weight = torch.empty(0, 8, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    dispatch.unpermute(rows, weight, permutation).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_norm_of_cuda_sees_a_small_change_of_its_weight(
    request: pytest.FixtureRequest,
) -> None:
    """The weight of query and key norms was rounded to bf16 first: near 1 it moved by 2^-7."""
    norm, x = RMSNorm(64, 1e-6), torch.randn(256, 64).bfloat16()
    before = norm(x)
    with torch.no_grad():
        norm.weight.fill_(1 + 2**-9)
    expected = norm(x)
    request.getfixturevalue("cuda_branch")
    assert not torch.equal(norm(x), before)
    torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=0)
    assert (norm(x) != expected).float().mean() < 0.01


@pytest.mark.usefixtures("cuda_branch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_norm_of_cuda_returns_its_inputs_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's autocast has `rms_norm` in its list of float32 functions, so queries became float32.

    The CPU's has not: that autocast is off where it is called is what can be seen here.
    """
    calls: list[tuple[bool, torch.dtype, torch.dtype]] = []
    real = functional.rms_norm

    def record(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
        calls.append((torch.is_autocast_enabled("cpu"), x.dtype, weight.dtype))
        return real(x, shape, weight, eps)

    monkeypatch.setattr(functional, "rms_norm", record)
    norm, x = RMSNorm(64, 1e-6), torch.randn(4, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert calls == [(False, wide, wide)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_until_top_p_selects_what_a_running_sum_selects(dtype: torch.dtype) -> None:
    """`cumsum` of floats is refused on CUDA under `train.deterministic`; a product is not."""
    probability_TK = torch.rand(500, 8, dtype=dtype).sort(1, descending=True).values
    probability_TK /= probability_TK.sum(1, keepdim=True)
    before_TK = torch.cat(
        [probability_TK.new_zeros(500, 1), probability_TK.cumsum(1)[:, :-1]], dim=1
    )
    expected_TK = (before_TK < 0.6) | (torch.arange(8) < 2)
    assert torch.equal(until_top_p(probability_TK, 0.6, 2), expected_TK)


LAUNCHES = {
    # exchange, EP size, kernels: forward, backward. Two of a backward are of the test's own sum of
    # outputs and losses. Collectives count as one. What each is for: benchmarks/README.md.
    ("packed", 1, "torch"): (30, 29),
    ("padded", 1, "torch"): (103, 41),
    ("packed", 8, "torch"): (48, 35),
    ("padded", 8, "torch"): (109, 47),
    ("packed", 1, "triton"): (29, 22),
    ("padded", 8, "triton"): (101, 30),
}


@pytest.mark.usefixtures("cuda_branch", "known_counts")
@pytest.mark.parametrize(("exchange", "ep", "kernels"), LAUNCHES)
def test_a_layer_launches_no_more_kernels_than_it_did(
    exchange: str, ep: int, kernels: str, request: pytest.FixtureRequest
) -> None:
    """Small batches on a GPU wait for the host: about 5 microseconds for each launch."""
    capacity = CapacityConfig(factor=1.25 if exchange == "padded" else None)
    with torch.device("meta"):
        more: dict[str, Any] = {"exchange": exchange, "kernels": kernels}
        layer = MoE(64, 64, 16, 4, capacity=capacity, **more).bfloat16()
        if ep > 1:
            request.getfixturevalue("fake_world")
            shard_experts(layer, build_mesh(ep, torch.device("meta")))
        x = torch.empty(1, 512, 64, dtype=torch.bfloat16, requires_grad=True)
        layer(x)  # the first one compares what the ranks pass
        with KernelCounter() as forward:
            output = layer(x)
        loss = output.y.sum() + sum(output.aux.values())
        with KernelCounter() as backward:
            loss.backward()
    most_forward, most_backward = LAUNCHES[exchange, ep, kernels]
    assert forward.count <= most_forward
    assert backward.count <= most_backward
