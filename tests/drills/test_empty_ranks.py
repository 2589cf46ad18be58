"""Fault 15: ranks without tokens: no hang, no NaN, and the gradients of one process.

tutel#173, DeepSpeed#5794 (a capacity from the local number of tokens), Automodel#935,
DeepSpeed#7461 (a rank without tokens).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dmoe.config.schema import CapacityConfig, Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.distributed import mesh
from dmoe.distributed.expert_parallel import expert_parameters, shard_experts
from dmoe.distributed.full_tensors import gather_full
from dmoe.distributed.gradients import all_reduce_sum
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import TokenContext
from dmoe.train import engine as engines
from dmoe.train.step import compute_gradients, grad_norm, training_batches
from tests.drills.worker import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.drills

W, S, D, E = 4, 6, 8, 4
Arrays = dict[str, np.ndarray]


def gradients_of(
    rank: int, world: int, config: Config
) -> tuple[Arrays, float, float, list[list[int]]]:
    """Return full gradients, loss, norm and choice counts of each layer in the first step."""
    here, data = worlds.init_distributed("cpu"), open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size, torch.float64)
    totals = compute_gradients(engine, training_batches(data.train, engine, 0))
    values = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
    full = gather_full(values, set(expert_parameters(engine.model)), engine.mesh)
    found = {name: value.numpy().copy() for name, value in full.items()}
    return (
        found,
        totals.loss_sum,
        grad_norm(totals),
        [layer.choice_counts for layer in totals.layers],
    )


@pytest.mark.parametrize(
    "settings",
    [
        ["moe.exchange=packed"],
        ["moe.exchange=packed", "moe.capacity.factor=1.0"],
        ["moe.exchange=padded", "moe.capacity.factor=8.0"],
    ],
    ids=["dropless", "capacity", "padded"],
)
def test_all_tokens_to_one_expert(settings: list[str]) -> None:
    """Fixed routing with one domain: expert 0 gets all tokens, three ranks of four none."""
    one = [
        "moe.router.kind=fixed",
        "moe.top_k=1",
        "moe.router.renormalize=false",
        "moe.balance.switch=0",
        "moe.balance.z=0",
    ]
    ((alone, loss, norm, choices),) = run_ranks(
        1, gradients_of, tiny(*one, *settings, "parallel.virtual_ranks=4")
    )
    assert choices == [[128, *[0] * 7]] * 2
    for found, its_loss, its_norm, its_choices in run_ranks(
        W, gradients_of, tiny(*one, *settings, "parallel.ep=4")
    ):
        assert its_choices == choices
        assert its_loss == pytest.approx(loss, rel=1e-10)
        assert its_norm == pytest.approx(norm, rel=1e-10)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert np.isfinite(found[name]).all(), name
            np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-12, err_msg=name)
    experts = [value for name, value in alone.items() if ".experts." in name]
    assert all(value[0].any() and not value[1:].any() for value in experts), (
        "other experts have tokens too"
    )


def inputs() -> Tensor:
    return torch.sin(torch.arange(W * S * D, dtype=torch.float64)).view(W, S, D)


def layer_gradients(
    rank: int, world: int, exchange: str, factor: float | None, padding: bool
) -> tuple[Arrays, np.ndarray]:
    """Return the gradients of full weights and of the input, for the sum of squared outputs.

    Sequence 2 is left out or replaced by padding. One process has all other sequences; of four
    ranks each has one, and rank 2 has none (or padding).
    """
    limits = CapacityConfig(factor=factor)
    layer = MoE(
        D,
        2 * D,
        E,
        2,
        capacity=limits,
        exchange=exchange,
        virtual_ranks=W if world == 1 and padding else 1,
    ).double()
    groups = mesh.build_mesh(world, torch.device("cpu"))
    if world > 1:
        shard_experts(layer, groups)
        layer.initialize(0)
    own = list(range(W)) if world == 1 else [rank]
    x = inputs()[
        own if padding else [sequence for sequence in own if sequence != 2]
    ].requires_grad_()
    valid = torch.ones(len(x), S, dtype=torch.bool)
    if padding and 2 in own:
        valid[own.index(2)] = False
    output = layer(x, TokenContext(valid_T=valid.flatten()) if padding else TokenContext())
    output.y.square().sum().backward()
    values = {
        name: p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in layer.named_parameters()
    }
    experts = set(expert_parameters(layer))
    for name in values.keys() - experts:
        values[name] = all_reduce_sum(values[name], groups)
    full = gather_full(values, experts, groups)
    assert x.grad is not None
    return {name: value.numpy().copy() for name, value in full.items()}, x.grad.numpy().copy()


@pytest.mark.parametrize(
    ("exchange", "factor", "padding"),
    [("packed", None, False), ("packed", None, True), ("packed", 1.0, True), ("padded", 1.0, True)],
)
def test_a_rank_without_tokens(exchange: str, factor: float | None, padding: bool) -> None:
    """No tokens, or only padding, as at the end of an evaluation.

    A capacity needs equal shapes on all ranks, so it is tested with padding.
    """
    ((alone, x_alone),) = run_ranks(1, layer_gradients, exchange, factor, padding)
    ranks = run_ranks(W, layer_gradients, exchange, factor, padding)
    for found, _ in ranks:
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(
        np.concatenate([x for _, x in ranks]), x_alone, rtol=1e-10, atol=1e-12
    )
    assert all(value.any() for value in alone.values())
    assert len(ranks[2][1]) == (1 if padding else 0)
    assert not ranks[2][1].any()
