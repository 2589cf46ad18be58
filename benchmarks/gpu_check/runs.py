"""Engines, steps and jobs that the checks run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

from accelerate.state import AcceleratorState

from benchmarks.gpu_check.checks import Machine
from dmoe.config.load import to_yaml
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed.init import ProcessInfo, init_distributed
from dmoe.train.engine import Engine, build_engine
from dmoe.train.step import train_step, training_batches


def fresh_accelerate() -> None:
    """One process builds many engines; accelerate expects one."""
    AcceleratorState._reset_state(reset_partial_state=True)


def engine_of(config: Config, device: str) -> Engine:
    fresh_accelerate()
    config = replace(config, train=replace(config.train, device=device))
    process: ProcessInfo = init_distributed(device)
    data = load_data(config)
    return build_engine(config, process, data.tokenizer.vocab_size)


def load_data(config: Config) -> Any:
    return open_data(config.data, config.train.seed)


def run_steps(
    config: Config, steps: int, device: str = "cpu", scheduled: bool = False
) -> tuple[Engine, list[float]]:
    """Train without a launcher and without a run directory; mean losses in nats."""
    engine = engine_of(config, device)
    data = engine.task.open_data().train
    losses = []
    for step in range(steps):
        rate = learning_rate(step, config.train.steps, config.optim) if scheduled else 1e-3
        result = train_step(engine, training_batches(data, engine, step), rate)
        losses.append(result.totals.loss)
    return engine, losses


def torchrun(
    machine: Machine, ranks: int, name: str, config: Config, more: list[str]
) -> tuple[int, list[float]]:
    """Train under torchrun; its exit code and the training losses."""
    path, run = machine.folder / f"{name}.yaml", machine.folder / name
    path.write_text(to_yaml(config), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    command += ["-m", "dmoe", "train", "--quiet", str(path), f"train.run_dir={run}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if machine.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(
            ","
        )[0]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return done.returncode, [math.nan]
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return 0, [record["loss"] for record in records if record["event"] == "train"]
