"""`dmoe train` runs the loop that `dmoe verify` proves step by step: rate, samples, order, numbers.

`verify` calls the step itself, so a trainer that took the learning rate or the samples of another
step would be equal to nothing and differ from nothing.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from dmoe.checkpoint import save_load
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.train.checkpointer import load_training_state
from dmoe.train.engine import Engine, build_engine
from dmoe.train.evaluation import evaluate
from dmoe.train.step import compute_gradients, train_step, training_batches, update
from dmoe.train.telemetry import Telemetry
from dmoe.verify.naive.step import scheduled_rate
from tests.cli.commands import SMALL, metrics, run_in_process
from tests.tiny import VOCAB

pytestmark = pytest.mark.ranks


def build(config: Config) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_engine(config, init_distributed("cpu"), VOCAB)


def test_speed_is_of_all_steps_since_the_last_line() -> None:
    """The tokens per second of one step over the seconds of ten were no test's difference."""
    engine = build(load(None, [*SMALL, "data.source=synthetic:zipf"]))
    data = engine.task.open_data()
    telemetry = Telemetry(engine, data.domains)
    recorder = telemetry.start_recording(time.monotonic())
    batches = training_batches(data.train, engine, 0)
    result = update(engine, compute_gradients(engine, batches, recorder=recorder), 0.001)
    line = telemetry.train_record(
        result, tokens=7, interval_tokens=5 * 128, learning_rate=0.001, seconds=2.0
    )
    assert line["tokens_per_second"] == 8 * 16 * 5 / 2
    flops = 3 * engine.model.flops_per_token(16) * line["tokens_per_second"]
    assert line["mfu"] == pytest.approx(flops / telemetry.peak_flops)


def test_a_run_is_the_loop_of_its_steps(tmp_path: Path) -> None:
    settings = ("data.source=synthetic:zipf", "optim.warmup=2", "optim.schedule=linear")
    settings += ("train.eval_every=2", "train.seed=3", "moe.balance.bias=0.01")
    run = run_in_process("train", *SMALL, *settings, "train.run_dir=run", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = metrics(tmp_path / "run")
    trained = {line["step"]: line for line in lines if line["event"] == "train"}
    evaluated = {line["step"]: line for line in lines if line["event"] == "eval"}
    config = load(tmp_path / "run" / "resolved.yaml")
    engine = build(config)
    data, targets = engine.task.open_data(), 8 * 16
    for step in range(6):
        rate = scheduled_rate(step, 6, config.optim)
        result = train_step(engine, training_batches(data.train, engine, step), rate)
        line = trained[step + 1]
        assert line["lr"] == pytest.approx(rate, rel=1e-12)
        assert line["loss"] == pytest.approx(result.totals.loss_sum / targets, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(result.grad_norm, rel=1e-4)
        assert line["tokens"] == (step + 1) * targets
        if step % 2:
            loss = evaluate(engine, data).loss
            assert evaluated[step + 1]["loss"] == pytest.approx(loss, rel=1e-5)
    assert sorted(evaluated) == [2, 4, 6]
    trained_here = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    path = save_load.find_latest(tmp_path / "run" / "checkpoints")
    assert path is not None
    extra = load_training_state(engine, path)
    assert (extra["step"], extra["tokens"]) == (6, 6 * targets)
    for name, parameter in engine.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), trained_here[name], rtol=1e-3, atol=1e-4)
