"""Profiler traces: valid JSON, only of the chosen steps and ranks, with the MoE stages by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as distributed_init
from dmoe.moe.dispatch import NO_RANGE, STAGES, profiled
from dmoe.observability.profiler import StepProfiler, trace_path
from dmoe.train import engine as engine_module
from dmoe.train.step import train_step, training_batches
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks


def profile_steps(
    rank: int, world: int, config: Config, folder: Path, ranks: list[int]
) -> list[str]:
    """Run three steps, profile the second; return the lines printed."""
    process = distributed_init.init_distributed("cpu")
    data = open_data(config.data, config.train.seed)
    engine = engine_module.build_engine(config, process, data.tokenizer.vocab_size)
    printed: list[str] = []
    profiler = StepProfiler([2], ranks, rank, folder, printed.append)
    for step in range(3):
        with profiler.profile(step + 1):
            train_step(engine, training_batches(data.train, engine, step), 1e-3)
    return printed


def names(path: Path) -> Counter[str]:
    """Count complete events ("X" with start and duration) by name, as trace viewers read them."""
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(
        event["name"]
        for event in events
        if event.get("ph") == "X" and event["dur"] >= 0 and event["ts"] > 0
    )


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_moe_stages_are_in_the_trace_of_every_rank(exchange: str, tmp_path: Path) -> None:
    config = tiny(f"moe.exchange={exchange}", "moe.capacity.factor=1.0")
    printed = run_ranks(2, profile_steps, config, tmp_path, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        trace_path(tmp_path, 2, rank).name for rank in range(2)
    ]
    for rank in range(2):
        found, path = names(trace_path(tmp_path, 2, rank)), trace_path(tmp_path, 2, rank)
        exchanges = (
            5 if exchange == "packed" else 4
        )  # a layer: the counts, out and back, forward and backward
        assert {name: found[name] for name in STAGES} == dict.fromkeys(STAGES, 2) | {
            "exchange": 2 * exchanges
        }
        assert printed[rank] == [f"trace of step 2: {path} (open it at ui.perfetto.dev)"]


def test_only_chosen_ranks_are_profiled(tmp_path: Path) -> None:
    assert run_ranks(2, profile_steps, tiny(), tmp_path, [1])[0] == []
    assert [path.name for path in tmp_path.iterdir()] == [trace_path(tmp_path, 2, 1).name]


def test_unwritable_trace_folder_does_not_stop_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.write_text("a file in the place of the folder")
    printed: list[str] = []
    with StepProfiler([1], [], 0, folder, printed.append).profile(1):
        torch.ones(2).sum()
    assert len(printed) == 1
    assert printed[0].startswith("no trace of step 1")


def test_stage_without_profiler_costs_nothing() -> None:
    """`record_function` costs 14 microseconds even without a profiler: it must not be entered."""
    assert profiled("route") is NO_RANGE
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert profiled("route") is not NO_RANGE
