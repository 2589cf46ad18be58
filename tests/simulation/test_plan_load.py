"""`dmoe plan` under a recorded load or a workload: what ranks wait for, and what pays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.config.schema import CapacityConfig, Config, RouterConfig
from dmoe.replay.part import ChoiceSpec
from dmoe.replay.writer import ChoiceWriter
from dmoe.simulation import decision
from dmoe.simulation.cluster import load_cluster, usable_memory
from dmoe.simulation.decision import Option, beside_the_layout, options
from dmoe.simulation.load import ReplayedLoad, make_load, regroup
from dmoe.simulation.plan_page import numbers, page
from dmoe.simulation.planner import _first, make_plan
from dmoe.simulation.replay import replay_steps
from dmoe.simulation.search import Layout, Search, given_layout
from dmoe.simulation.simulate import setting_of
from dmoe.simulation.trace import Trace, open_trace
from dmoe.train.tasks import task_of
from tests.cli.commands import run_in_process
from tests.tiny import SMALL, VOCAB, tiny

WORLD = 4
STEPS, SAMPLES, SEQ_LEN = 3, 8, 16


def uneven_choices(seed: int) -> np.ndarray:
    """Draw two of 8 experts per token and layer, the first ones most often: [steps, N, L, K]."""
    random = np.random.default_rng(seed)
    liking = random.gumbel(size=(STEPS, SAMPLES * SEQ_LEN, 2, 8)) - 0.4 * np.arange(8)
    return np.argsort(-liking, axis=-1)[..., :2]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("recorded")
    writer = ChoiceWriter(
        folder, ChoiceSpec("", 0, SAMPLES, SEQ_LEN, 2, 8, 2), "run", 0, field="tracking.trace"
    )
    for step, expert_NLK in enumerate(uneven_choices(0)):
        writer.add(step, expert_NLK, "", np.ones(expert_NLK.shape, np.float32))
    writer.flush()
    return open_trace(folder)


def load_of(trace: Trace, config: Config) -> ReplayedLoad:
    found = make_load(config, WORLD, choices=trace)
    assert isinstance(found, ReplayedLoad)
    return found


@pytest.mark.parametrize("samples", [1, 3, 8, 12, 24])
def test_steps_of_another_size_have_the_same_samples_in_order(samples: int, trace: Trace) -> None:
    every = uneven_choices(0).reshape(-1, 2, 2)
    cut = regroup(trace, samples, 1 << 30)
    assert len(cut.steps) == STEPS * SAMPLES // samples
    for step in cut.steps:
        rows = slice(step * samples * SEQ_LEN, (step + 1) * samples * SEQ_LEN)
        assert (cut.choices(step) == every[rows]).all()
        assert (cut.counts(step).sum(0) == np.stack([
            np.bincount(every[rows, layer].ravel(), minlength=8) for layer in range(2)
        ])).all()  # fmt: skip
    few = regroup(trace, samples, 2 * samples * SEQ_LEN * 4)
    assert len(few.steps) == min(2, len(cut.steps))


def walked(factor: float | None, ep: int, micro_batch: int) -> tuple[list[float], float]:
    """Walk every token of a micro-batch and layer: rows of the busiest rank, and drops.

    Rows are over the rows that a balanced router gives a rank. The groups of a capacity are ranks.
    """
    every = uneven_choices(0).reshape(STEPS * SAMPLES, SEQ_LEN, 2, 2)
    tokens, busiest, dropped = micro_batch * SEQ_LEN, [], 0
    slots = 1 << 30 if factor is None else int(np.ceil(factor * tokens * 2 / 8 - 1e-9))
    for first in range(0, len(every) - WORLD * micro_batch + 1, WORLD * micro_batch):
        for layer in range(2):
            rows = [0] * WORLD
            for rank in range(WORLD):
                taken = [0] * 8
                start = first + rank * micro_batch
                for expert in every[start : start + micro_batch, :, layer].ravel():
                    if taken[expert] == slots:
                        dropped += 1
                        continue
                    taken[expert] += 1
                    rows[rank // ep * ep + expert // (8 // ep)] += 1
            busiest.append(max(rows) / (tokens * 2))
    return busiest, dropped / (STEPS * SAMPLES * SEQ_LEN * 4)


@pytest.mark.parametrize("factor", [None, 1.25])
@pytest.mark.parametrize(("ep", "micro_batch"), [(2, 1), (4, 1), (4, 2)])
def test_a_recorded_load_is_that_of_the_tokens_walked_one_by_one(
    factor: float | None, ep: int, micro_batch: int, trace: Trace
) -> None:
    config = tiny(f"moe.capacity.factor={'null' if factor is None else factor}")
    load = load_of(trace, config)
    busiest, dropped = walked(factor, ep, micro_batch)
    assert sorted(load.ranks(ep, micro_batch)) == pytest.approx(sorted(busiest))
    assert load.drop_rate(ep, micro_batch) == pytest.approx(dropped)
    assert load.mean_max(ep, micro_batch) <= load.p99(ep, micro_batch) <= load.worst(ep)


HOT = {"W0": 1.0, "W1": None, "W2": 1.6, "W3": 1.2, "W5": 4 / 3, "W6": 1.6}
"""Rows of the busiest of four ranks over the mean, where each workload is made for four ranks."""


@pytest.mark.parametrize("workload", HOT)
def test_a_workload_is_as_hot_as_it_says(workload: str) -> None:
    router = RouterConfig(kind="workload", workload=workload, ranks=4)  # type: ignore[arg-type]
    found = make_load(tiny(), WORLD, choices=router).mean_max(4)
    assert found == pytest.approx(HOT[workload], rel=0.04) if HOT[workload] else 1 < found < 1.61


def test_a_burst_is_in_the_99th_percentile() -> None:
    router = RouterConfig(kind="workload", workload="W7", ranks=4)
    load = make_load(tiny(), WORLD, choices=router)
    assert load.mean_max(4) == pytest.approx((4 + 1.6) / 5, rel=0.02)
    assert load.p99(4) == pytest.approx(1.6, rel=0.02)
    assert load.quantile(0.5, 4) == pytest.approx(1, rel=0.02)


def a_search(config: Config, load: ReplayedLoad, precision: str = "fp32") -> Search:
    return Search(config, WORLD, load_cluster("h100x8"), precision, load, VOCAB, (1, 1))


@pytest.mark.slow
def test_pools_drop_less_and_copies_wait_less(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each number is that of the config with the change, run for itself."""
    monkeypatch.setattr(decision, "POOLS", (4,))
    monkeypatch.setattr(decision, "COPIES", (1,))
    config = tiny("moe.capacity.factor=1.25", "train.micro_batch=1", "parallel.ep=4")
    search = a_search(config, load_of(trace, config))
    usable = usable_memory(search.cluster, WORLD)
    best = search.estimate(Layout(4, "ddp", 1, "none", "padded"), usable)
    found = {o.change: o for o in options(search, best, usable, [2.0, None])}
    planned, pool = found[""], found["moe.capacity.pool=4"]
    copies = found["parallel.placement.copies=1 moe.exchange=packed"]
    assert planned.gain == 1
    assert not any(o.problem for o in found.values())
    assert pool.drop_rate < planned.drop_rate == copies.drop_rate
    assert copies.busiest < planned.busiest
    assert found["moe.capacity.factor=null moe.exchange=packed"].drop_rate == 0
    option = found["moe.capacity.factor=2"]
    other = replace(config, moe=replace(config.moe, capacity=CapacityConfig(2.0)))
    alone = a_search(other, load_of(trace, other)).estimate(best.layout, usable)
    assert (option.seconds, option.peak) == (alone.time.total, alone.memory.peak)
    assert option.drop_rate == pytest.approx(walked(2.0, 4, 1)[1])
    search.close()


@pytest.mark.slow
def test_the_page_of_a_workload_and_the_faster_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "POOLS", ())
    monkeypatch.setattr(decision, "COPIES", (1,))
    config = tiny("moe.capacity.factor=1.25", "train.global_batch=4")
    router, cluster = RouterConfig(kind="workload", workload="W2"), load_cluster("h100x8")
    plan, precision = make_plan(
        config, WORLD, cluster, num_outputs=VOCAB, ep_sizes=[4], choices=router
    )
    text = "\n".join(page(plan, precision, None, None))
    assert "workload W2, made for 4 ranks" in text
    assert "without what is dropped" in text
    assert text.index("Imbalance of the EP ranks") < text.index("Beside the layout")
    assert "Copies" in text
    assert "nothing is claimed" not in text
    assert numbers(plan, precision, None, None)["options"][0]["gain"] == 1
    best, load = plan.best[0], plan.load
    assert isinstance(load, ReplayedLoad)
    search = a_search(config, load, precision)
    both = [
        search.estimate(best.layout._replace(exchange=exchange), plan.usable).time.total
        for exchange in ("packed", "padded")
    ]
    search.close()
    assert best.time.total == min(both)


def test_without_choices_nothing_is_claimed_of_pools_and_copies() -> None:
    for sigma in (0.0, 0.3):
        text = "\n".join(beside_the_layout([Option("")], make_load(tiny(), WORLD, sigma)))
        assert "nothing is claimed" in text
        assert " pay" not in text


def test_virtual_ranks_route_apart_and_compute_together(trace: Trace) -> None:
    """Two ranks with two virtual ranks each were planned as two: half of a global group.

    Their capacity groups are those of four ranks; the rows of their experts are of two.
    """
    config = tiny("parallel.virtual_ranks=2", "moe.capacity.group=global", "moe.capacity.factor=1")
    apart = load_of(trace, tiny("moe.capacity.group=global", "moe.capacity.factor=1"))
    together = make_load(config, 2, choices=trace)
    assert together.drop_rate(2, 1) == apart.drop_rate(2, 1) != apart.drop_rate(2, 2)
    plain = make_load(tiny("parallel.virtual_ranks=2"), 2, choices=trace)
    chosen = uneven_choices(0).reshape(-1, 4 * SEQ_LEN, 2, 2)
    first = (chosen < 4).sum((1, 3)).ravel()
    whole = 4 * SEQ_LEN * 2
    assert sorted(plain.ranks(2, 1)) == sorted(np.maximum(first, whole - first) / (whole / 2))


SHAPES = "moe.experts.shapes=[[64],[32],[16],[8],[8],[8],[8],[8]]"


def test_experts_of_different_shapes_are_where_training_puts_them(trace: Trace) -> None:
    """Training balances their work; simulate, replay and plan counted rows of equal runs."""
    config = tiny(SHAPES)
    with torch.device("meta"):
        layer = next(iter(task_of(config, VOCAB).build_model(1).moe_layers()))
    owned = layer.experts.placement(2).experts
    assert len(owned[0]) != len(owned[1])
    rows_ALW = next(replay_steps(trace, setting_of(config, 4, 2))).rows_ALW
    chosen = uneven_choices(0)[0].reshape(2, -1, 2, 2)  # rows of the mesh, tokens, layers, K
    for row, rank, column in np.ndindex(2, 2, 2):
        found = np.isin(chosen[row, :, column], owned[rank]).sum()
        assert rows_ALW[0, column, 2 * row + rank] == found
    steps = replay_steps(trace, setting_of(config, 4, 2))
    busiest = np.mean([s.rows_ALW.max(2) / s.rows_ALW.mean(2) for s in steps])
    assert load_of(trace, config).mean_max(2, 2) == pytest.approx(busiest, abs=1e-3)


def test_a_config_whose_first_layout_cannot_run_is_planned_with_the_others(trace: Trace) -> None:
    """A rule against FSDP, or a trace too short for the config's own micro-batch, ended all."""
    config = tiny("modular.bank=prefix", "modular.modules=2", "modular.train=one_module")
    search = a_search(config, load_of(trace, config))
    first = _first(search, [1, 2], ["ddp", "fsdp"], 1)
    assert first.mode == "ddp"
    assert search.allows(first)
    assert not search.allows(first._replace(mode="fsdp"))
    longer = tiny("train.global_batch=32")
    load = load_of(trace, longer)
    assert [n for n in (1, 2, 4, 8) if load.answers(n)] == [1, 2, 4]
    search = a_search(longer, load)
    assert given_layout(longer, WORLD).micro_batch == 8
    assert search.requests_of_given() == []


BAD = {
    "--sigma 0.3 --workload W2": "--workload=W2: says the imbalance, and --sigma does too",
    "--trace runs --workload W2": "--workload=W2: says the imbalance, and --trace does too",
    "--workload W9": "--workload=W9: must be one of W0",
    "--workload W2 model.dense_first=2": "--workload=W2: loads experts, and the model has none",
    "--price 2": "--price=2.0: is the price of an hour",
    "--tokens 0": "0 must be above 0",
    "--sigma 1e6": "1e6 must be at most 10",
    "--ep 3 --ranks 4": "--ep=3: leaves no layout: parallel.ep=3: must divide the world",
    "--ranks 64": "train.global_batch=8: must be a multiple of the 64",
    "--factor 1,2": "--factor=1,2: compares what is dropped",
    "--trace nowhere": "--trace=nowhere: is no directory with a trace",
    "--trace {trace} moe.num_experts=16": "experts (moe.num_experts), and the config 16",
    "--trace {trace} --ranks 32 train.global_batch=32": "has 24 sequences, and all ranks together",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(arguments: str, trace: Trace, tmp_path: Path) -> None:
    given = arguments.format(trace=trace.path).split()
    done = run_in_process("plan", *SMALL, *given, cwd=tmp_path)
    assert done.returncode == 2
    assert not done.stdout
    assert BAD[arguments] in done.stderr
    assert done.stderr.count("\n") == 1
