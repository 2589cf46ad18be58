"""A trace is a JSON that viewers open, of the chosen steps and ranks alone, with the layer's parts under their names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.moe.profiling import NOTHING, STAGES, profiled
from dmoe.observability.profiler import Profiling, trace_path
from dmoe.train import engine as engines
from dmoe.train.step import training_batches
from dmoe.train.step import train_step
from tests.ranks import run_ranks
from tests.tiny import tiny


def profile_steps(
    rank: int, world: int, config: Config, folder: Path, ranks: list[int]
) -> list[str]:
    """Three steps, of which the second is profiled; what was told."""
    here = worlds.init_distributed("cpu")
    data = open_data(config.data, config.train.seed)
    engine = engines.build(config, here, data.tokenizer.vocab_size)
    told: list[str] = []
    profiling = Profiling([2], ranks, rank, folder, told.append)
    for step in range(3):
        with profiling.around(step + 1):
            train_step(engine, training_batches(data.train, engine, step), 1e-3)
    return told


def names(path: Path) -> Counter[str]:
    """Complete events ("X" with a start and a duration), as chrome://tracing and Perfetto read them, by name."""
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(
        event["name"]
        for event in events
        if event.get("ph") == "X" and event["dur"] >= 0 and event["ts"] > 0
    )


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_the_stages_are_in_the_trace_of_every_rank(exchange: str, tmp_path: Path) -> None:
    config = tiny(f"moe.exchange={exchange}", "moe.capacity.factor=1.0")
    told = run_ranks(2, profile_steps, config, tmp_path, [])
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
        assert told[rank] == [f"trace of step 2: {path} (open it at ui.perfetto.dev)"]


def test_only_chosen_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, profile_steps, tiny(), tmp_path, [1])[0] == []
    assert [path.name for path in tmp_path.iterdir()] == [trace_path(tmp_path, 2, 1).name]


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.write_text("a file in the place of the folder")
    told: list[str] = []
    with Profiling([1], [], 0, folder, told.append).around(1):
        torch.ones(2).sum()
    assert len(told) == 1
    assert told[0].startswith("no trace of step 1")


def test_without_a_profiler_a_stage_is_nothing() -> None:
    """record_function costs 14 microseconds whether or not somebody profiles: it must not be entered."""
    assert profiled("route") is NOTHING
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert profiled("route") is not NOTHING
