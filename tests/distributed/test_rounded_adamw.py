"""Moments in bfloat16: their rounding on any number of ranks, against `verify`'s own AdamW."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dmoe.distributed.optimizers.rounded_adamw import (
    RoundedAdamW,
    random_bits,
    round_stochastically,
)
from dmoe.moe.rng import generator
from dmoe.verify.naive.optimizer import _rounded
from dmoe.verify.verify import verify
from tests.tiny import tiny


def optimizer(model: nn.Module) -> RoundedAdamW:
    return RoundedAdamW([{"params": [*model.parameters()]}], 0.01, (0.9, 0.95), 1e-8, model, 0, 3)


def test_rounding_is_that_of_the_naive_twin_and_keeps_the_expectation() -> None:
    value = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1e-3
    value[:3] = torch.tensor([0.0, -0.0, 1.0])
    key = torch.tensor(generator(3, "moments", "w").initial_seed())
    for step in (1, 7):
        start = torch.tensor(step) * (0xBF58476D1CE4E5B9 - 2**64) + key
        random = random_bits(torch.arange(4000), start)
        found = round_stochastically(value, (random >> 16) & 0xFFFF)
        assert torch.equal(found, _rounded(value, (3, "moments", "w"), step, 16))
    assert torch.equal(found[:3].float(), value[:3]), "exact numbers are kept"
    many = torch.full((1 << 16,), 1 + 2**-9)
    mean = round_stochastically(many, torch.arange(1 << 16)).double().mean()
    assert mean == 1 + 2**-9
    spread = random_bits(torch.arange(1 << 16), key) >> 40 & 0xFFFF
    assert abs(spread.double().mean() / 0xFFFF - 0.5) < 0.01


def test_a_moment_follows_gradients_too_small_for_the_nearest_number() -> None:
    """After 400 equal gradients from a large moment, v is that of float32 within 2% of its mean."""
    layer = nn.Linear(64, 64, bias=False)
    rounded = optimizer(layer)
    for step in range(400):
        layer.weight.grad = torch.full((64, 64), 10.0 if step == 0 else 0.01)
        rounded.step()
    state = rounded.state[layer.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    for name, beta, first, later in (("exp_avg", 0.9, 10, 0.01), ("exp_avg_sq", 0.95, 100, 1e-4)):
        exact = (1 - beta) * first * beta**399 + later * (1 - beta**399)
        assert abs(state[name].double().mean() / exact - 1) < 0.02, name


def test_chunks_cover_each_element_once_with_its_own_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ParameterDict({"a": torch.randn(7, 5, 3), "b": torch.randn(4), "c": torch.randn(())})
    update = optimizer(model)
    for chunk in (1, 40, 1 << 18):
        monkeypatch.setattr("dmoe.distributed.optimizers.rounded_adamw.CHUNK", chunk)
        for parameter in model.values():
            parts = list(update._chunks(parameter, [parameter.detach()]))
            index = np.concatenate([found.numpy().ravel() for found, _ in parts])
            assert index.tolist() == list(range(parameter.numel()))
            values = torch.cat([held.flatten() for _, (held,) in parts])
            assert torch.equal(values, parameter.detach().flatten())


@pytest.mark.ranks
def test_verify_finds_the_same_training_on_any_number_of_ranks() -> None:
    """The naive layer's step rounds by numpy; DDP and FSDP2, EP 1 and 2; checkpoints; two steps."""
    report = verify(tiny("optim.moments=bf16"), worlds=[1, 2])
    assert report.first is None, report.first
