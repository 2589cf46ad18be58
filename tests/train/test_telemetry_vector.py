"""What telemetry costs a step, and that its packed vector is read by the names it was written with."""

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
from dmoe.train.step import (
    NULL_RECORDER,
    StepResult,
    compute_gradients,
    grad_norm,
    training_batches,
)
from dmoe.train.telemetry import Telemetry
from tests.distributed.test_costs import COLLECTIVES, READS, counted
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny


def costs_of_two_steps(rank: int, world: int, config: Config) -> list[Counter[str]]:
    """Collectives and host reads of a plain step and of a logged one, the line included."""
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
                telemetry.train_record(result, tokens=0, learning_rate=1e-3, seconds=1.0, steps=1)
        engine.optimizer.zero_grad()
        found.append(counter)
    return found


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_what_logging_costs(exchange: str) -> None:
    """Two small reductions and a host read of each, on the steps that are logged; on the others nothing."""
    config = tiny(
        f"moe.exchange={exchange}",
        "moe.capacity.factor=1.0",
        "train.micro_batch=2",
        "moe.balance.bias=0.01",
    )
    for plain, logged in run_ranks(2, costs_of_two_steps, config):
        assert logged - plain == Counter(all_reduce=2, tolist=2)
        assert not plain - logged


def test_every_sum_is_asked_for() -> None:
    """The names in the packed vector are those the observer returns; one too few would shift all that follow."""
    from dmoe.moe.layer import MoE
    from dmoe.moe.metrics import router_metrics
    from dmoe.moe.routing import TokenContext

    seen = MoE(8, 4, 4, 2)(torch.randn(3, 8), TokenContext(metrics_fn=router_metrics)).stats.metrics
    assert tuple(seen) == (*SUMS, *MAXIMA)


def test_a_step_that_is_not_a_number_keeps_its_keys() -> None:
    """`bits_per_byte` of a step whose loss was NaN was left out of its line for a day, as if it were what training does not count."""
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
    return telemetry.train_record(result, tokens=0, learning_rate=1e-3, seconds=1.0, steps=1)
