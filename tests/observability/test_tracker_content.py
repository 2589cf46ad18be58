"""Values in metrics.jsonl, TensorBoard, wandb and the report, of a run forced onto one expert."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmoe.observability.trackers.content import (
    MAX_COLUMNS,
    MAX_LIST_ITEMS,
    MAX_LISTED_SCALARS,
    LoadHistory,
    scalars,
)
from dmoe.runs.metrics_log import read_metrics
from tests.cli.commands import SMALL, dmoe, environment, metrics
from tests.drills.jobs import events, start
from tests.observability.wandb_file import all_records, read_rows
from tests.report.pages import Page, read_page

FORCED, EXPERTS, STEPS = 5, 8, 6
COMMAND = f"""
import torch
from dmoe.cli.main import run
from dmoe.moe.routers.base import LearnedRouter

own = LearnedRouter.logits
push_E = torch.zeros({EXPERTS}).index_fill(0, torch.tensor({FORCED}), 50.0)
LearnedRouter.logits = lambda self, *inputs: own(self, *inputs) + push_E
run()
"""
BOTH = "tracking.trackers=[tensorboard,wandb]"
FLOAT32 = 1e-6
SIX_DIGITS = 1e-5


@dataclass
class RunOutputs:
    """One run, read from each of the four outputs."""

    run: Path

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.run / "metrics.jsonl")

    @cached_property
    def train(self) -> dict[int, dict[str, Any]]:
        return {line["step"]: line for line in self.lines if line["event"] == "train"}

    @cached_property
    def tensorboard(self) -> EventAccumulator:
        sizes = {"scalars": 0, "images": 0, "tensors": 0}
        return EventAccumulator(str(self.run / "logs/tensorboard"), size_guidance=sizes).Reload()

    @cached_property
    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        """Scalars of TensorBoard."""
        return {
            tag: [(event.step, event.value) for event in self.tensorboard.Scalars(tag)]
            for tag in self.tensorboard.Tags()["scalars"]
        }

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of wandb."""
        return read_rows(self.run / "logs/wandb")

    def in_wandb(self, name: str) -> list[tuple[int, float]]:
        return [(row["_step"], row[name]) for row in self.rows if name in row]

    @cached_property
    def page(self) -> Page:
        return read_page(self.run / "report.html")

    def figure(self, name: str) -> Any:
        """Read wandb's newest file of this name."""
        path = next(row[f"{name}/path"] for row in reversed(self.rows) if f"{name}/path" in row)
        (folder,) = (self.run / "logs/wandb").glob("offline-run-*")
        return json.loads((folder / "files" / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> RunOutputs:
    place = tmp_path_factory.mktemp("forced")
    options = [
        "data.source=synthetic:zipf",
        "train.sample_tokens=0",
        "moe.top_k=1",
        "moe.router.renormalize=false",
        "tracking.name=first try",
        "tracking.group=sweep",
        "tracking.tags=[a,b]",
        "tracking.entity=team",
        "tracking.notes=to see",
        BOTH,
    ]
    command = [sys.executable, "-c", COMMAND, "train", *SMALL, *options, "train.run_dir=run"]
    outcome = subprocess.run(
        command,
        cwd=place,
        env=environment() | {"HOME": str(place)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return RunOutputs(place / "run")


def test_the_run_has_the_name_and_labels_of_the_config(outputs: RunOutputs) -> None:
    run = all_records(outputs.run / "logs/wandb", "run")[-1]
    assert (run.display_name, run.run_group, run.entity) == ("first try", "sweep", "team")
    assert (list(run.tags), run.notes, run.project) == (["a", "b"], "to see", "dmoe")


def test_the_start_says_where_the_run_comes_from(outputs: RunOutputs) -> None:
    start = read_metrics(outputs.run / "metrics.jsonl")[0]
    assert start["event"] == "start"
    assert "train.run_dir=run" in start["command"]
    assert start["versions"]["torch"] == torch.__version__
    assert "cores" in start["machine"]
    # the temporary directory is in no repository
    assert not {"commit", "dirty"} & start.keys()


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the expected scalars by name."""
    found = {
        f"train/{key}": line[key]
        for key in ("loss", "bits_per_byte", "grad_norm", "drop_rate", "lr", "tokens", "mfu")
    }
    found |= {
        "train/step_time/forward": line["step_time"]["forward"],
        "train/aux_weighted/z": line["aux_weighted"]["z"],
    }
    for layer, name in zip(line["layers"], ("layer_00", "layer_01"), strict=True):
        for key in (
            "drop_rate",
            "load_cv",
            "dead_experts",
            "router_entropy",
            "effective_k",
            "logit_max",
        ):
            found[f"{name}/{key}"] = layer[key]
        found[f"{name}/aux/switch"] = layer["aux"]["switch"]
        found[f"{name}/drop_rate_by_choice/choice_1"] = layer["drop_rate_by_choice"][0]
        found[f"{name}/load_by_rank/rank_00"] = layer["load_by_rank"][0]
        found[f"{name}/traffic/0_to_0"] = layer["traffic"][0][0]
        for expert in range(EXPERTS):
            found[f"{name}/load/expert_0{expert}"] = layer["load"][expert]
            found[f"{name}/kept/expert_0{expert}"] = layer["kept"][expert]
    return found


def leaves(value: Any) -> int:
    if isinstance(value, dict):
        return sum(
            leaves(item)
            for key, item in value.items()
            if key not in ("event", "step", "time", "layer")
        )
    return sum(map(leaves, value)) if isinstance(value, list) else 1


def test_values_agree_at_every_step(outputs: RunOutputs) -> None:
    """JSONL, TensorBoard, wandb: the same numbers under names that group by layer."""
    assert sorted(outputs.train) == list(range(1, STEPS + 1))
    for name in numbers_of(outputs.train[1]):
        written = [(step, numbers_of(line)[name]) for step, line in outputs.train.items()]
        assert outputs.in_wandb(name) == written, name
        assert outputs.scalars[name] == [
            (step, pytest.approx(value, rel=FLOAT32)) for step, value in written
        ], name
    for line in (line for line in outputs.lines if line["event"] == "eval"):
        assert (line["step"], line["loss"]) in outputs.in_wandb("eval/loss")
        assert (line["step"], pytest.approx(line["loss"], rel=FLOAT32)) in outputs.scalars[
            "eval/loss"
        ]


def test_no_number_is_missing(outputs: RunOutputs) -> None:
    first = {
        key
        for key, value in outputs.rows[0].items()
        if not key.startswith("_") and isinstance(value, int | float)
    }
    assert len(first) == leaves(outputs.train[1])
    media = (
        "_",
        "experts/hottest_and_coldest/",
        "experts/load_layer_by",
        "layer_00/load_expert_by",
        "layer_01/load_expert_by",
    )
    in_wandb = {
        key for row in outputs.rows for key, value in row.items() if isinstance(value, int | float)
    }
    assert {key for key in in_wandb if not key.startswith(media)} == set(outputs.scalars)


def test_report_has_the_same_values(outputs: RunOutputs) -> None:
    for chart, curve, key in (
        ("Loss", "training", "loss"),
        ("grad-norm", "all", "grad_norm"),
    ):
        expected = {
            step: pytest.approx(line[key], rel=SIX_DIGITS) for step, line in outputs.train.items()
        }
        assert outputs.page.curve(chart, curve) == expected
    for layer in range(2):
        view = outputs.page.view("load", f"0|{layer}")
        assert view["x"] == list(outputs.train)
        loads = [line["layers"][layer]["load"] for line in outputs.train.values()]
        assert view["z"] == [list(row) for row in zip(*loads, strict=True)]


def test_collapse_is_visible_everywhere(outputs: RunOutputs) -> None:
    expected = [float(EXPERTS) if expert == FORCED else 0.0 for expert in range(EXPERTS)]
    for line in outputs.train.values():
        for layer in line["layers"]:
            assert layer["load"] == [128 * share / EXPERTS for share in expected]
            assert layer["dead_experts"] == EXPERTS - 1
    alerts = [line["text"] for line in outputs.lines if line["event"] == "alert"]
    assert any("expert collapse" in text for text in alerts)
    assert outputs.scalars["layer_01/load/expert_05"] == [(step, 128.0) for step in outputs.train]
    assert [
        (alert.title, alert.text) for alert in all_records(outputs.run / "logs/wandb", "alert")
    ] == [("routing", text) for text in alerts]
    assert any("expert collapse" in text for text in tensorboard_texts(outputs, "alert/routing"))
    assert "expert collapse" in outputs.page.text
    assert outputs.figure("layer_00/load_expert_by_step")["data"][0]["z"] == [
        [share] * STEPS for share in expected
    ]
    last = outputs.figure("experts/load_layer_by_expert")["data"][0]
    assert (last["y"], last["x"], last["z"]) == ([0, 1], list(range(EXPERTS)), [expected, expected])
    table = outputs.figure("experts/hottest_and_coldest")
    assert table["columns"] == ["layer", "place", "expert", "choices", "share"]
    assert [1, "hottest 1", FORCED, 128, float(EXPERTS)] in table["data"]
    assert (
        "| 1 | hottest 1 | 5 | 128 | 8 |"
        in tensorboard_texts(outputs, "experts/hottest_and_coldest")[-1]
    )


def tensorboard_texts(outputs: RunOutputs, name: str) -> list[str]:
    return [
        event.tensor_proto.string_val[0].decode()
        for event in outputs.tensorboard.Tensors(f"{name}/text_summary")
    ]


def test_tensorboard_heat_maps(outputs: RunOutputs) -> None:
    """A row per expert, a column per step: red for all tokens, dark blue for none."""
    events = outputs.tensorboard.Images("layer_00/load_expert_by_step")
    assert [event.step for event in events] == [3, 6], "at the evaluation and at the end only"
    image = np.asarray(Image.open(io.BytesIO(events[-1].encoded_image_string)))
    rows, columns = image.shape[0] // EXPERTS, image.shape[1] // STEPS
    cells = image[rows // 2 :: rows, columns // 2 :: columns]
    assert cells.shape == (EXPERTS, STEPS, 3)
    for expert in range(EXPERTS):
        assert (cells[expert] == ((178, 16, 30) if expert == FORCED else (24, 55, 115))).all(), (
            expert
        )
    assert [event.step for event in outputs.tensorboard.Images("experts/load_layer_by_expert")] == [
        3,
        6,
    ]


def test_report_is_a_wandb_artifact(outputs: RunOutputs) -> None:
    (report,) = [
        item
        for item in all_records(outputs.run / "logs/wandb", "artifact")
        if item.type == "report"
    ]
    (file,) = report.manifest.contents
    written = (outputs.run / "report.html").read_bytes()
    assert file.path == "report.html"
    assert file.digest == base64.b64encode(hashlib.md5(written).digest()).decode()
    assert Path(file.local_path).read_bytes() == written
    staged = [
        item.local_path
        for record in all_records(outputs.run / "logs/wandb", "artifact")
        for item in record.manifest.contents
    ]
    assert all(Path(path).is_relative_to(outputs.run) for path in staged), (
        "the home directory may be missing at `wandb sync`"
    )


def test_failed_report_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "run/report.html/in-the-way").mkdir(parents=True)
    result = dmoe(
        "train",
        *SMALL,
        "train.steps=1",
        "data.source=synthetic:zipf",
        "train.run_dir=run",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "note: there is no report at the end of this run" in result.stdout
    *_, end, note = metrics(tmp_path / "run")
    assert end["event"] == "end"
    assert "irectory" in note["text"], "the reason"
    assert not list((tmp_path / "run").glob(".report*"))


def test_long_lists_are_not_sent_as_scalars() -> None:
    def layer(experts: int) -> dict[str, Any]:
        return {
            "layer": 0,
            "load": [1] * experts,
            "drop_rate": 0.5,
            "logit_max": None,
            "co_selection": [[1, 2], [2, 1]],
        }

    assert set(scalars({"layers": [layer(2)]}, "train")) == {
        "layer_00/load/expert_00",
        "layer_00/load/expert_01",
        "layer_00/drop_rate",
    }
    assert set(scalars({"layers": [layer(MAX_LIST_ITEMS + 1)]}, "train")) == {"layer_00/drop_rate"}
    assert len(scalars({"layers": [layer(MAX_LIST_ITEMS)] * 1}, "train")) == MAX_LIST_ITEMS + 1
    many = [
        {**layer(MAX_LIST_ITEMS), "layer": index}
        for index in range(MAX_LISTED_SCALARS // MAX_LIST_ITEMS + 1)
    ]
    assert len(scalars({"layers": many}, "train")) == len(many), "one per layer"
    assert scalars(
        {"loss": float("nan"), "split": "held_out", "layers": [{"layer": 3, "stability": 0.1}]},
        "eval",
    ) == {"layer_03/eval/stability": 0.1}


def test_thinned_history_keeps_a_collapse() -> None:
    """The heat map has the newest of 10,000 steps, and the one where one expert gets all tokens."""
    steps, worst = 10_000, 4330
    lines = [
        {
            "event": "train",
            "step": step,
            "layers": [{"layer": 2, "load": [8, 0] if step == worst else [4, 4]}],
        }
        for step in range(1, steps + 1)
    ]
    drawn, rows = LoadHistory(lines).by_step()[2]
    assert MAX_COLUMNS / 2 <= len(drawn) <= MAX_COLUMNS + 1
    assert drawn == sorted(set(drawn))
    assert drawn[-1] == steps
    assert {
        step: (one, other) for step, one, other in zip(drawn, *rows, strict=True) if one != other
    } == {worst: (2.0, 0.0)}


def each_step_once(outputs: RunOutputs, steps: int) -> None:
    expected = [(step, line["loss"]) for step, line in outputs.train.items()]
    assert [step for step, _ in expected] == list(range(1, steps + 1))
    assert outputs.in_wandb("train/loss") == expected
    assert outputs.scalars["train/loss"] == [
        (step, pytest.approx(value, rel=FLOAT32)) for step, value in expected
    ]
    assert outputs.page.view("load", "0|0")["x"] == [step for step, _ in expected]
    assert outputs.figure("layer_00/load_expert_by_step")["data"][0]["x"] == [
        step for step, _ in expected
    ]


@pytest.mark.drills
@pytest.mark.parametrize("fault", ["kill@step rank=0 step=7", "term@step rank=any step=6"])
def test_killed_or_stopped_run_has_no_gap(tmp_path: Path, fault: str) -> None:
    """Rank 0 is killed in step 7, three steps after a checkpoint, and torchrun restarts.

    Or all ranks are stopped, so there is a report of seven steps, and the job is started again.
    """
    run, killed = tmp_path / "run", fault.startswith("kill")
    outcome = start(
        run,
        BOTH,
        "train.eval_every=4",
        ranks=2,
        restarts=1 if killed else 0,
        fault=fault,
        HOME=str(tmp_path),
    )
    if not killed:
        assert outcome.code != 0
        assert events(run, "end")[-1]["stopped"], outcome.errors[-3000:]
        each_step_once(RunOutputs(run), 7)
        outcome = start(run, BOTH, "train.eval_every=4", ranks=2, HOME=str(tmp_path))
    assert outcome.code == 0, outcome.errors[-3000:]
    assert [line["resumed_from"] for line in events(run, "restart")] == [4 if killed else 7]
    each_step_once(RunOutputs(run), 12)
