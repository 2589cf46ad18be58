"""`dmoe plan --calibrate`: the tables it writes, how a step is timed by them, and the interval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmoe.bench.measure import machine
from dmoe.config.errors import ConfigError
from dmoe.simulation.calibration import timed_step
from dmoe.simulation.calibration.calibrate import MODELS, Effort, calibrate, curves
from dmoe.simulation.calibration.cluster_file import check_target, write
from dmoe.simulation.calibration.timed_step import TimedStep
from dmoe.simulation.cluster import FOLDER, load_cluster, parse
from dmoe.simulation.dry_run import dry_run
from dmoe.simulation.measured import OTHER, Measured, Products, at, read
from dmoe.simulation.memory import totals
from dmoe.simulation.plan_page import numbers
from dmoe.simulation.planner import make_plan
from dmoe.simulation.recording.kernel import Kernel
from dmoe.simulation.step_time import step_time
from tests.cli.commands import refused, run_in_process
from tests.tiny import VOCAB, tiny

GRID = Products(
    [[1.0, 4.0], [1.0, 4.0], [1.0, 4.0]], [2.0 * 4**i for i in (0, 1, 1, 2, 1, 2, 2, 3)]
)
"""Two seconds per element of the product's volume."""


def table(ranks: int, **changes: Any) -> Measured:
    kernels = {OTHER: [[1.0, 3.0]], "mul float32": [[1.0, 1.0], [100.0, 10.0]]}
    sent = {kind: [[1.0, 5.0]] for kind in ("all_to_all", "all_reduce", "all_gather")}
    found = Measured(ranks, 1, 0.25, 0.5, {"float32": GRID}, kernels, sent)
    return replace(found, **changes)


def test_times_between_and_beyond_the_points() -> None:
    """Linear in the logarithms between; in proportion beyond; constant below."""
    assert GRID((2, 2, 2)) == pytest.approx(16.0)
    assert GRID((8, 4, 4)) == pytest.approx(256.0)
    assert GRID((4, 4, 1)) == pytest.approx(32.0)
    curve = [[1.0, 1.0], [100.0, 10.0]]
    assert [read(curve, n) for n in (0.1, 10, 200)] == pytest.approx([1, math.sqrt(10), 20])
    measured = table(1)
    assert measured.kernel_seconds(Kernel("never", (), "float32", 0, 7)) == 21.0
    # beyond its own points: what others take for the bytes that are more
    big = Kernel("mul", (), "float32", 0, 150)
    assert measured.kernel_seconds(big) == pytest.approx(10 + 3.0 * 50)


def test_a_step_is_the_sum_of_its_parts() -> None:
    """Against a plain sum over the kernels and collectives of the dry run, on shared cores."""
    run = dry_run(tiny("parallel.ep=2"), 4, "fp32", cuda=False, num_outputs=VOCAB)
    tables = [table(1), table(2), table(4, products={}, kernels={})]
    cluster = replace(load_cluster("h100x8"), device="cpu", measured=tuple(tables))
    times = step_time(run, cluster, 2)
    kernels, collectives = totals(run)
    expected = dict.fromkeys(("matrix", "attention", "memory", "host"), 0.0)
    for kernel, count in kernels.items():
        part = {"gemm": "matrix", "attention": "attention"}.get(kernel.name, "memory")
        if kernel.name == "gemm" and kernel.shape[0] == 1:
            one = 2.0 * math.prod(max(1, n) for n in kernel.shape[1:])
        elif kernel.name == "mul" and kernel.dtype == "float32" and kernel.bytes <= 100:
            one = kernel.bytes**0.5
        elif kernel.name == "mul" and kernel.dtype == "float32":
            one = 10 + 3.0 * (kernel.bytes - 100)
        else:
            one = 3.0 * kernel.bytes
        expected[part] += 2 * count * one  # four ranks on two cores
        expected["host"] += 2 * count * 0.25
    for part, seconds in expected.items():
        assert getattr(times, part) == pytest.approx(seconds), part
    sent = sum(n * (5.0 * c.sent + 0.5) for c, n in collectives.items() if c.name == "all_to_all")
    assert times.exchange == pytest.approx(sent)
    assert times.gradients > 0
    assert times.total == pytest.approx(sum(expected.values()) + sent + times.gradients)


def test_which_table_holds_for_a_number_of_ranks() -> None:
    tables = [table(1), table(2), table(4, products={}, kernels={}), table(8, products={})]
    found = [at(tables, world) for world in (1, 2, 3, 4, 16)]
    assert [(a.ranks, factor, c.ranks) for a, factor, c in found] == [
        (1, 1.0, 1), (2, 1.0, 2), (2, 1.5, 4), (2, 2.0, 4), (2, 8.0, 8),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="calibrated for one rank"):
        at([replace(table(1), collectives={})], 2)


def test_curves_are_means_of_like_sizes() -> None:
    mul = [Kernel("mul", (), "float32", 0, size) for size in (64, 96, 256)]
    gemm = Kernel("gemm", (1, 2, 2, 2), "float32", 16, 48)
    kernels = [(mul[0], 3, 1.0), (mul[1], 1, 5.0), (mul[2], 1, 8.0), (gemm, 1, 9.0)]
    found = curves([TimedStep([1.0], kernels, 0)])
    assert found == {name: [[72.0, 2.0], [256.0, 8.0]] for name in ("mul float32", OTHER)}


def test_the_kernels_of_a_step_are_timed_where_they_run() -> None:
    import torch

    timer = timed_step.OperatorTimer()
    x = torch.ones(4, 8)
    with timer:
        for _ in range(2):
            (x @ x.t()).view(16).mul(2.0)
    found = {kernel.name: (count, seconds > 0) for kernel, count, seconds in timer.kernels(2)}
    assert found == {"gemm": (1.0, True), "mul": (1.0, True)}


def test_below_the_smallest_measured_size() -> None:
    """A curve has the shape of all kernels there, products that of their FLOPs."""
    kernels = {
        OTHER: [[1.0, 1.0], [100.0, 10.0]],
        "silu bfloat16": [[100.0, 30.0]],
        "batched products bfloat16": [[100.0, 30.0]],
    }
    measured = table(1, kernels=kernels)
    small = [Kernel("silu", (), "bfloat16", 0, size) for size in (100, 10, 1)]
    assert [measured.kernel_seconds(k) for k in small] == pytest.approx([30, 3 * 10**0.5, 3])
    products = [Kernel("gemm", (2, 1, 1, 1), "bfloat16", size, 1) for size in (100, 50, 1)]
    assert [measured.kernel_seconds(k) for k in products] == pytest.approx([30, 15, 1])


@pytest.mark.ranks
def test_calibrate_writes_a_file_that_plan_reads(tmp_path: Path) -> None:
    """On tiny settings: a source for each number, tables, and the interval of the residuals."""
    model = MODELS[0].replace("=96", "=32").replace("=64", "=16")
    sizes = ((16, 64), (16, 64), (16, 64))
    effort = Effort((model,), 0.0, 1, sizes, 0.0, (64, 4096), 2)
    path = tmp_path / "mine.yaml"
    write(calibrate([1, 2], effort), path, machine())
    cluster = load_cluster(str(path))
    assert cluster.error == max(map(abs, cluster.residuals)) > 0
    assert all("measured on 2" in source for source in cluster.sources.values())
    assert {t.ranks for t in cluster.measured} == {1, 2}
    plan, precision = make_plan(tiny(), 2, cluster, num_outputs=VOCAB)
    best: Any = json.loads(json.dumps(numbers(plan, precision, None, None)))["best"][0]
    assert best["error"] == cluster.error
    assert 0 < best["seconds_per_step"]["total"] < 60


def _drop_seconds(content: Any) -> None:
    products = content["measured"]["value"][0]["products"]["float32"]
    products["seconds"] = products["seconds"][1:]


def _unsort(content: Any) -> None:
    content["measured"]["value"][0]["kernels"][OTHER].reverse()


BROKEN: list[tuple[Callable[[Any], object], str]] = [
    (lambda c: c["residuals"].update(value=[]), "residuals"),
    (lambda c: c["residuals"].update(value=[-2]), "residuals"),
    (lambda c: c["measured"]["value"][0].pop("threads"), "threads"),
    (lambda c: c["measured"].pop("source"), "source"),
    (_drop_seconds, "each combination"),
    (_unsort, "smallest first"),
    (lambda c: c["measured"].update(value=7), "measured"),
]


@pytest.mark.parametrize(("change", "word"), BROKEN)
def test_a_bad_table_gets_one_sentence(change: Callable[[Any], object], word: str) -> None:
    content = yaml.safe_load((FOLDER / "laptop.yaml").read_text(encoding="utf-8"))
    change(content)
    with pytest.raises(ConfigError, match=word) as error:
        parse(content, "mine")
    assert "\n" not in str(error.value)


def test_what_calibrate_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="existing directory"):
        check_target(tmp_path / "none" / "file.yaml")
    alone = run_in_process("plan", "--to", "x.yaml", cwd=tmp_path)
    refused(alone, "--to", "add --calibrate")
    tokens = run_in_process("plan", "--calibrate", "--tokens", "9", cwd=tmp_path)
    refused(tokens, "--tokens=9", "not read by --calibrate")
    many = run_in_process("plan", "--calibrate", "--ranks", "1,5000", cwd=tmp_path)
    refused(many, "--ranks=5000", "at most 64")  # it began, and would have started them all
    config = run_in_process("plan", "--calibrate", "model.dim=64", cwd=tmp_path)
    refused(config, "model.dim=64", "leave it out")
