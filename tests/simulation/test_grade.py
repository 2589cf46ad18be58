"""A run against its plan: drops exactly, memory and time only where the two are the same thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dmoe.report.panels.plan import Grade, Quantity
from dmoe.report.run import Run, load_runs
from dmoe.simulation.cluster import FOLDER, load_cluster
from dmoe.simulation.grade import grade
from tests.cli.commands import run_in_process
from tests.json_lines import json_lines
from tests.simulation.runs import train

STEPS = ("train.log_every=1", "moe.capacity.factor=1", "train.micro_batch=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a trace, on one process with two virtual ranks."""
    folder = tmp_path_factory.mktemp("graded") / "run"
    train(folder, "tracking.trace=choices", "parallel.virtual_ranks=2", *STEPS)
    return folder


def copy_of(folder: Path, to: Path, **start: object) -> Run:
    """Copy a run without its trace, with other values in its `start` line, on a faster machine."""
    to.mkdir()
    for name in ("resolved.yaml", "metrics.layers.bin"):
        (to / name).write_bytes((folder / name).read_bytes())
    lines = json_lines(folder / "metrics.jsonl")
    lines = [line | start if line["event"] == "start" else line for line in lines]
    (to / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_runs([to])[0]


def by_name(found: Grade) -> dict[str, Quantity]:
    return {quantity.name.partition(" (")[0]: quantity for quantity in found.quantities}


def test_the_drops_of_a_trace_are_those_of_the_run(folder: Path) -> None:
    found = grade(load_runs([folder])[0], None)
    drops = by_name(found)["dropped assignments"]
    assert drops.measured is not None
    assert 0.02 < drops.measured < 0.6
    assert drops.predicted == pytest.approx(drops.measured, abs=1e-12)
    assert "of the trace" in found.source
    assert "--cluster FILE" in by_name(found)["time of a step"].problem
    assert "whole process" in by_name(found)["peak memory of a rank"].problem


def test_logged_counts_stand_in_for_a_trace(folder: Path, tmp_path: Path) -> None:
    """One group of all tokens would drop this; groups of ranks drop more."""
    found = grade(copy_of(folder, tmp_path / "copy"), None)
    drops = by_name(found)["dropped assignments"]
    assert "at least" in drops.name
    assert drops.predicted is not None
    assert drops.measured is not None
    assert 0.01 < drops.predicted <= drops.measured


def test_time_and_memory_are_compared_on_the_same_kind_of_device(
    folder: Path, tmp_path: Path
) -> None:
    h100 = load_cluster("h100x8")
    assert (
        "the run was on cpu"
        in by_name(grade(load_runs([folder])[0], h100))["time of a step"].problem
    )
    found = by_name(grade(copy_of(folder, tmp_path / "gpu", device="cuda"), h100))
    memory, seconds = found["peak memory of a rank"], found["time of a step"]
    assert not memory.problem
    assert not seconds.problem
    assert memory.predicted is not None
    assert 1e5 < memory.predicted < 1e8
    assert seconds.error is not None
    assert seconds.predicted == pytest.approx((1 + seconds.error) * (seconds.measured or 0))


def test_code_of_its_own_is_never_run(folder: Path, tmp_path: Path) -> None:
    run = copy_of(folder, tmp_path / "code")
    config = yaml.safe_load((run.path / "resolved.yaml").read_text())
    config["moe"]["router"]["kind"] = "nowhere.py:Router"
    (run.path / "resolved.yaml").write_text(yaml.safe_dump(config))
    found = grade(load_runs([run.path])[0], None)
    assert not found.quantities
    assert "code of its own" in found.source


def test_a_trace_that_is_left_out_is_named(folder: Path, tmp_path: Path) -> None:
    """A report fell back to logged counts without a word: damaged, empty, or of another model."""
    run = copy_of(folder, tmp_path / "run")
    trace = run.path / "trace"
    trace.mkdir()
    part = next((folder / "trace").iterdir())
    content = part.read_bytes()
    for damaged, why in (
        (content[:-1] + bytes([content[-1] ^ 1]), f"{part.name} is damaged"),
        (content[:100], f"{part.name} cannot be read as choices"),
        (b"", "trace holds no choices of a run"),
    ):
        target = trace / part.name
        target.write_bytes(damaged) if damaged else target.unlink()
        found = grade(load_runs([run.path])[0], None)
        assert found.source.startswith(
            "planned with a load as the run logged it. Its trace is left"
        )
        assert why in found.source
        assert "--replay" not in found.source
        assert "at least" in by_name(found)["dropped assignments"].name
    (trace / part.name).write_bytes(content)
    config = yaml.safe_load((run.path / "resolved.yaml").read_text())
    config["moe"]["num_experts"] = 16
    (run.path / "resolved.yaml").write_text(yaml.safe_dump(config))
    found = grade(load_runs([run.path])[0], None)
    assert "since the run logged none of 16 experts" in found.source
    assert "trace has 8 experts (moe.num_experts), and the config 16." in found.source


def test_the_report_has_the_table(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run_in_process("report", str(folder), "--output", str(page), "--json", cwd=tmp_path)
    plans = json.loads(done.stdout)["plans"]["run"]
    assert [q["unit"] for q in plans["quantities"]] == ["bytes", "seconds", "share"]
    text = page.read_text(encoding="utf-8")
    assert "Predicted against measured" in text
    assert "not compared: on a CPU a run logs" in text
    # the report that training wrote has no plan, and says how to get one
    assert "dmoe report RUN compares" in (folder / "report.html").read_text(encoding="utf-8")
    wrong = run_in_process("report", str(folder), "--cluster", "h1000", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "--cluster=h1000: is neither a file nor one of" in wrong.stderr
    assert (FOLDER / "h100x8.yaml").is_file()
