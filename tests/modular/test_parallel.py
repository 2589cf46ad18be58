"""Sharded banks: two ranks with half of each bank compute outputs and gradients of one process."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from dmoe.config.errors import ConfigError
from dmoe.distributed import mesh
from dmoe.distributed.data_parallel import DDPStrategy
from dmoe.distributed.expert_parallel import expert_parameters, shard_experts
from dmoe.distributed.state_dict import model_state
from dmoe.modular import (
    AGGREGATIONS,
    BANKS,
    LoRA,
    Prompt,
    SparseDelta,
    adapter_context,
    adapter_layers,
    attach,
    constant,
    freeze,
    routed,
    table,
)
from tests.modular.nets import D, M, O, drawn, mlp, randomize
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

OPTIONS = {
    "low_rank": {"rank": 3},
    "adapter": {"hidden": 3},
    "scale": {},
    "sparse_delta": {"density": 0.3},
    "prompt": {"length": 2},
}
CASES = [
    *((bank, "weighted_sum", "top_k") for bank in sorted(OPTIONS)),
    *(("adapter", aggregation, "top_k") for aggregation in ("concat", "attention", "stacked")),
    *(("adapter", aggregation, "constant") for aggregation in ("mean", "gated")),
    ("low_rank", "weighted_sum", "soft"),
    ("low_rank", "weighted_sum", "lonely"),
]
ROUTERS = {
    "top_k": routed("top_k", M, 2),
    "soft": routed("soft", M, M),
    "constant": constant(0.1, 0.4, 0.2, 0.3),
    "lonely": table([[0, 1]], M),
}


def model_of(bank: str, aggregation: str, router: str, dtype: torch.dtype) -> nn.Module:
    model = mlp(dtype)
    places = "0" if bank == "prompt" else "[02]"  # a second prompt would overwrite the first one
    attach(
        model,
        places,
        partial(BANKS[bank], M, **OPTIONS[bank]),
        ROUTERS[router],
        AGGREGATIONS[aggregation],
    )
    randomize(model)
    return model


def numbers(
    rank: int, world: int, ep: int, case: tuple[str, str, str], dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """Return local outputs and all full gradients of the loss over a global batch of eight."""
    groups = mesh.build_mesh(ep, torch.device("cpu"))
    model = model_of(*case, dtype)
    freeze(model)
    shard_experts(model, groups)
    experts = expert_parameters(model)
    assert len(experts) == len(adapter_layers(model)) * len(
        list(model[0].modular.experts.parameters())
    )
    each = 8 // world
    x = drawn(8, 4, D, dtype=dtype)[rank * each : (rank + 1) * each].clone().requires_grad_()
    with adapter_context(
        model, label_T=torch.zeros(each, dtype=torch.int64)
    ):  # for "lonely": the second rank's modules get no rows
        y = model(x)
    y.square().sum().backward()
    out = {"y": y.detach().numpy(), "x": x.grad.numpy()}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert not parameter.requires_grad
            continue
        gradient = parameter.grad
        if world > 1 and name in experts and ep > 1:
            parts = [torch.empty_like(gradient) for _ in range(ep)]
            dist.all_gather(parts, gradient, group=groups.ep_group)
            gradient = torch.cat(parts)
        elif world > 1:
            dist.all_reduce(gradient)
        out[name] = gradient.numpy()
    return out


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-6)],
    ids=["float64", "float32"],
)
def test_two_ranks_are_one_process(
    case: tuple[str, str, str], dtype: torch.dtype, tolerance: float
) -> None:
    alone = numbers(0, 1, 1, case, dtype)
    ranks = run_ranks(2, numbers, 2, case, dtype)
    assert any(name.endswith("router.weight") for name in alone) == (case[2] in ("top_k", "soft"))
    for name, expected in alone.items():
        got = (
            np.concatenate([rank[name] for rank in ranks]) if name in ("x", "y") else ranks[1][name]
        )
        assert np.abs(got - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), name
        assert name == "x" or np.abs(expected).max() > 0 or name.endswith("gate"), (
            f"{name} is zero: the test proves nothing"
        )


def steps(rank: int, world: int, ep: int, bank: str) -> dict[str, np.ndarray]:
    """Train three steps with the engine and return the full state by name."""
    groups = mesh.build_mesh(ep, torch.device("cpu"))
    model = model_of(bank, "attention", "top_k", torch.float64)
    freeze(model)
    shard_experts(model, groups)
    replicated = DDPStrategy(model, groups, Accelerator(cpu=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    each = 8 // world
    for step in range(3):
        optimizer.zero_grad()
        x = drawn(8, 4, D, seed=step)[rank * each : (rank + 1) * each]
        with replicated.grad_sync(last=True):
            replicated.wrapped(x).square().sum().backward()
        replicated.wait_for_grads()
        optimizer.step()
    state = model_state(model, groups)
    return {
        name: (v.full_tensor() if isinstance(v, DTensor) else v).numpy()
        for name, v in state.items()
    }


@pytest.mark.parametrize("bank", ["low_rank", "sparse_delta"])
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (2, 1)])
def test_training_on_ranks_is_training_on_one(world: int, ep: int, bank: str) -> None:
    """Weights after three steps, gathered by name, including the positions of sparse modules."""
    alone = run_ranks(1, steps, 1, bank)[0]
    assert any(name.endswith("experts.index") for name in alone) == (bank == "sparse_delta")
    start = model_state(model_of(bank, "attention", "top_k", torch.float64), mesh.ParallelMesh())
    moved = [
        name for name, value in start.items() if not np.array_equal(value.numpy(), alone[name])
    ]
    assert any("experts" in name for name in moved)
    assert any("router.weight" in name for name in moved)
    assert all(".modular." in name for name in moved), "the core moved"
    for rank in run_ranks(world, steps, ep, bank):
        assert rank.keys() == alone.keys()
        for name, expected in alone.items():
            np.testing.assert_allclose(rank[name], expected, rtol=1e-9, atol=1e-10, err_msg=name)


def test_a_number_of_modules_that_ranks_cannot_share_is_refused() -> None:
    model = nn.Linear(D, O)
    layer = attach(model, "", partial(LoRA, 3), routed("top_k", 3, 1, renormalize=False))[""]
    with pytest.raises(ConfigError, match="divide by the 2 ranks"):
        layer.shard(2, 0)


def test_parameters_cannot_be_averaged_over_ranks() -> None:
    for bank in (partial(LoRA, M), partial(SparseDelta, M), partial(Prompt, M, length=1)):
        model = nn.Linear(D, O)
        attach(model, "", bank, routed("top_k", M, 2), AGGREGATIONS["parameter_mean"])[""].shard(
            2, 0
        )
        with pytest.raises(ConfigError, match=r"parallel\.ep=1"):
            model(torch.randn(2, 3, D))
