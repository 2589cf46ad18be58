"""Ray Train: one worker per GPU (or per share of a machine's cores), started on a Ray cluster.

    python launch/ray_train.py --workers 16 configs/multi_gpu.yaml train.run_dir=/shared/run1
    python launch/ray_train.py --workers 2 --cpus 1 configs/quickstart.yaml train.steps=20

Ray starts the workers, gives them their ranks (those of one machine in a row, as dmoe's
expert-parallel groups want them) and the process group; `dmoe.train` does the rest. A worker that
is lost makes Ray start all of them again, up to `--restarts` times, and the run resumes from its
last checkpoint if all machines see `train.run_dir`. All machines need the directory of the command.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

import dmoe


def train_one_rank(arguments: dict[str, Any]) -> None:
    """Train as the rank that Ray gave to this worker."""
    # Ray gives workers a directory of their own; relative paths mean those of the command.
    os.chdir(arguments["directory"])
    run = dmoe.train(arguments["config"])
    if ray.train.get_context().get_world_rank() == 0:
        print(f"trained: {run.path}")


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description="Train with dmoe on a Ray cluster.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="K=V")
    parser.add_argument("--workers", type=int, required=True, help="ranks over all machines")
    parser.add_argument("--cpus", type=int, default=0, help="cores per rank; default: GPUs")
    parser.add_argument("--restarts", type=int, default=3, help="restarts after a lost worker")
    given = parser.parse_args()
    config = dmoe.load_config(given.config, given.overrides)
    run_dir = str(Path(config.train.run_dir or "runs/ray").expanduser().absolute())
    config = replace(config, train=replace(config.train, run_dir=run_dir))
    on_gpu = given.cpus == 0
    resources = {"GPU": 1.0} if on_gpu else {"CPU": float(given.cpus)}
    trainer = TorchTrainer(
        train_one_rank,
        train_loop_config={"config": config, "directory": str(Path.cwd())},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=given.workers, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            failure_config=ray.train.FailureConfig(max_failures=given.restarts)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
