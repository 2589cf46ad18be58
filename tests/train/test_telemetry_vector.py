"""The cost of telemetry per step, and the names in its packed vector."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.moe.metrics import MAXIMA, SUMS
from dmoe.train import engine as engines
from dmoe.train.reduction import NULL_RECORDER
from dmoe.train.step import (
    StepResult,
    compute_gradients,
    grad_norm,
    training_batches,
)
from dmoe.train.telemetry import Telemetry
from tests.distributed.test_costs import COLLECTIVES, READS, counted
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

pytestmark = pytest.mark.ranks


def costs_of_two_steps(rank: int, world: int, config: Config) -> list[Counter[str]]:
    """Count collectives and host reads of an unlogged and of a logged step with its line."""
    here = worlds.init_distributed("cpu")
    data = open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    telemetry, found = Telemetry(engine, data.domains), []
    for step, logged in enumerate((False, True)):
        counter = Counter[str]()
        with pytest.MonkeyPatch.context() as patch:
            for owner, names in ((dist, COLLECTIVES), (torch.Tensor, READS)):
                for name in names:
                    patch.setattr(owner, name, counted(counter, name, getattr(owner, name)))
            recorder = telemetry.start_recording(time.monotonic()) if logged else NULL_RECORDER
            totals = compute_gradients(
                engine, training_batches(data.train, engine, step), recorder=recorder
            )
            if logged:
                result = StepResult(totals, grad_norm(totals), 1.0, False)
                telemetry.train_record(
                    result, tokens=0, learning_rate=1e-3, seconds=1.0, interval_tokens=1
                )
        engine.optimizer.zero_grad()
        found.append(counter)
    return found


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_cost_of_logging(exchange: str) -> None:
    """Two small reductions and one host read of each in logged steps; nothing in others."""
    config = tiny(
        f"moe.exchange={exchange}",
        "moe.capacity.factor=1.0",
        "train.micro_batch=2",
        "moe.balance.bias=0.01",
    )
    for plain, logged in run_ranks(2, costs_of_two_steps, config):
        assert logged - plain == Counter(all_reduce=2, tolist=2)
        assert not plain - logged


def test_all_names_are_packed() -> None:
    """The vector's names are those of the metrics function; one less would shift the rest."""
    from dmoe.moe.layer import MoE
    from dmoe.moe.metrics import router_metrics
    from dmoe.moe.routing import TokenContext

    seen = MoE(8, 4, 4, 2)(torch.randn(3, 8), TokenContext(metrics_fn=router_metrics)).stats.metrics
    assert tuple(seen) == (*SUMS, *MAXIMA)


def test_a_step_of_nan_loss_keeps_its_keys() -> None:
    """Once `bits_per_byte` was missing from the line of a step whose loss was NaN."""
    line = run_ranks(1, line_of_a_bad_step, tiny())[0]
    assert math.isnan(line["loss"])
    assert math.isnan(line["bits_per_byte"])


def line_of_a_bad_step(rank: int, world: int, config: Config) -> dict[str, Any]:
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), VOCAB)
    telemetry = Telemetry(engine, ())
    batches = training_batches(engine.task.open_data().train, engine, 0)
    totals = compute_gradients(
        engine, batches, target_bytes=1, recorder=telemetry.start_recording(time.monotonic())
    )
    result = StepResult(replace(totals, loss_sum=math.nan), grad_norm(totals), 1.0, False)
    return telemetry.train_record(
        result, tokens=0, learning_rate=1e-3, seconds=1.0, interval_tokens=1
    )
