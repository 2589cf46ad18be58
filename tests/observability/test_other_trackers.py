"""Trackers by accelerate's names, against stand-ins that have the interface of each library.

The stand-ins hold the signatures of the releases of 2026-11; an argument that a library does not
have raises, as there.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.rules.tracking import LIBRARIES, check_tracking
from dmoe.observability.trackers import Trackers
from dmoe.runs.directory import RunDir
from tests.cli.commands import refused, run_in_process
from tests.json_lines import json_lines

RECORD = """
import json, os
def record(name, *args, **kwargs):
    with open(os.environ["STAND_IN_RECORD"], "a") as file:
        file.write(json.dumps([name, args, kwargs], default=str) + "\\n")
"""
SOURCES = {
    "mlflow": """
class Run: pass
def set_tracking_uri(uri): record("uri", uri)
def search_experiments(view_type=1, max_results=None, filter_string=None, order_by=None): return []
def create_experiment(name, artifact_location=None, tags=None, trace_location=None): return "1"
def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None,
              tags=None, description=None, log_system_metrics=None):
    record("start", run_name, tags); return Run()
def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None,
                model_id=None, dataset=None): record("log", metrics, step)
def log_text(text, artifact_file, run_id=None): record("config", text)
def log_table(data, artifact_file, run_id=None): record("table", data)
def end_run(status="FINISHED"): record("finish")
""",
    "swanlab": """
config = type("Config", (dict,), {"update": lambda self, values, allow_val_change: record("config", values)})()
class Image:
    def __init__(self, data, caption=None): self.shape = data.shape
class Run:
    def log(self, data, step=None, print_to_console=False): record("log", data, step)
    def finish(self): record("finish")
def init(reinit=None, log_dir=None, mode=None, workspace=None, project=None, public=None, name=None,
         color=None, description=None, job_type=None, group=None, tags=None, id=None, resume=None,
         parallel=None, config=None, settings=None, callbacks=None):
    record("start", name, mode); return Run()
""",
    "trackio": """
config = type("Config", (dict,), {"update": lambda self, values, allow_val_change: record("config", values)})()
class Run:
    def log(self, metrics, step=None): record("log", metrics, step)
    def finish(self): record("finish")
def init(project, name=None, group=None, space_id=None, config=None, resume="never"):
    record("start", name); return Run()
""",
    "aim": """
class Image:
    def __init__(self, image, caption="", format="png", quality=90, optimize=False):
        self.size = image.size
class Run:
    def __init__(self, run_hash=None, *, repo=None, read_only=False, experiment=None):
        record("start", repo, experiment)
    def __setitem__(self, key, value): record("config", value)
    def track(self, value, name=None, step=None, epoch=None, *, context=None):
        record("log", {name: value}, step)
    def close(self): record("finish")
""",
    "comet_ml": """
__version__ = "3.50.0"
class Experiment:
    def log_parameters(self, values): record("config", values)
    def set_step(self, step): pass
    def log_metric(self, name, value, step=None): record("log", {name: value}, step)
    def end(self): record("finish")
def start(api_key=None, workspace=None, project_name=None, experiment_key=None, mode=None,
          online=None, experiment_config=None): record("start", online); return Experiment()
""",
    "clearml": """
class Logger:
    def report_scalar(self, title, series, value, iteration): record("log", {title: value}, iteration)
    def report_image(self, title, series, iteration=None, local_path=None, image=None): record("image", title)
    def report_table(self, title, series, iteration=None, table_plot=None): record("table", table_plot)
class Task:
    current_task = staticmethod(lambda: None)
    @staticmethod
    def set_offline(offline_mode=False): record("offline", offline_mode)
    @staticmethod
    def init(project_name=None, task_name=None, tags=None, auto_connect_arg_parser=True,
             auto_connect_streams=True): record("start", task_name); return Task()
    def connect_configuration(self, configuration): record("config", configuration)
    def get_logger(self): return Logger()
    def close(self): record("finish")
""",
    "dvclive": """
class Live:
    def __init__(self, dir="dvclive", resume=False, report=None, save_dvc_exp=True,
                 dvcyaml="dvc.yaml", cache_images=False, exp_name=None): record("start", save_dvc_exp)
    def log_params(self, params): record("config", params)
    def log_metric(self, name, val, timestamp=False, plot=True): record("log", {name: val}, self.step)
    def next_step(self): pass
    def end(self): record("finish")
""",
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the stand-ins on the path; return the file of their calls."""
    for name, source in SOURCES.items():
        (tmp_path / "libraries" / name).mkdir(parents=True)
        (tmp_path / "libraries" / name / "__init__.py").write_text(RECORD + source)
    plots = tmp_path / "libraries" / "dvclive" / "plots.py"
    plots.write_text(
        "class Metric:\n    could_log = staticmethod(lambda v: isinstance(v, float))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "libraries"))
    monkeypatch.setenv("STAND_IN_RECORD", str(tmp_path / "calls"))
    for variable in ("COMET_OFFLINE_DIRECTORY", "CLEARML_CACHE_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path / "calls"
    for name in [n for n in sys.modules if n.partition(".")[0] in SOURCES]:
        del sys.modules[name]


def calls(path: Path) -> list[tuple[str, list[object]]]:
    lines = json_lines(path)
    return [(name, args) for name, args, _ in lines]


@pytest.mark.parametrize("name", LIBRARIES)
def test_numbers_alerts_and_figures_arrive(name: str, stand_ins: Path, tmp_path: Path) -> None:
    """Each step once with its numbers; the config; load per expert where the library shows it."""
    run, notes = RunDir(tmp_path / "run"), list[str]()
    run.create(None)
    config = load(None, [f"tracking.trackers=[{name}]", "tracking.name=mine"])
    check_tracking(config)
    trackers = Trackers(Accelerator(cpu=True), config, run, notify=notes.append)
    for step in (1, 2):
        layers = [{"layer": 0, "load": [3.0, 1.0], "drop_rate": 0.25}]
        trackers.log({"loss": 1.0 / step, "layers": layers}, step)
    trackers.alert("spike", "a text")
    trackers.finish(None)
    trackers.close()
    assert notes == []
    found = calls(stand_ins)
    kinds = [kind for kind, _ in found]
    assert kinds.count("start") == kinds.count("finish") == 1
    assert kinds[-1] == "finish"
    assert "top_k" in json.dumps(next(args for kind, args in found if kind == "config"))
    logged = {
        (key, step): value
        for kind, (values, step) in (call for call in found if call[0] == "log")
        for key, value in values.items()
    }
    losses = {step: value for (key, step), value in logged.items() if key.endswith("loss")}
    assert losses == {1: 1.0, 2: 0.5}
    assert ("alert/spike", 2) in logged
    assert any("expert_01" in key for key, _ in logged)
    shown = {"mlflow": "table", "clearml": "table"}
    if name in shown:
        assert shown[name] in kinds
    if name in ("aim", "swanlab"):
        assert any("load_expert_by_step" in key for key, _ in logged)
    if name in ("swanlab", "comet_ml", "clearml"):
        assert any(
            args[-1] in ("offline", False, True)
            for kind, args in found
            if kind in ("start", "offline")
        )
        assert "online" not in json.dumps([args for kind, args in found if kind == "start"])


def test_a_missing_library_is_one_sentence(tmp_path: Path) -> None:
    """Before anything is written, in training and before a sweep."""
    for name in LIBRARIES:
        with pytest.raises(ConfigError, match=f"pip install {LIBRARIES[name]}"):
            check_tracking(load(None, [f"tracking.trackers=[tensorboard,{name}]"]))
    options = ("tracking.trackers=[mlflow]", "train.run_dir=run", "data.source=synthetic:zipf")
    for arguments in (("train", *options), ("sweep", options[0], "train.seed=0,1")):
        result = run_in_process(*arguments, cwd=tmp_path)
        refused(result, "tracking.trackers=mlflow", "pip install mlflow")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_fails_ends_no_run(stand_ins: Path, tmp_path: Path) -> None:
    run, notes = RunDir(tmp_path / "run"), list[str]()
    run.create(None)
    config = load(None, ["tracking.trackers=[trackio]"])
    trackers = Trackers(Accelerator(cpu=True), config, run, notify=notes.append)
    trackers.accelerator.trackers[0].tracker.run = None
    trackers.log({"loss": 1.0}, 1)
    trackers.log({"loss": 1.0}, 2)
    assert len(notes) == 1
    assert "trackio failed after step 1; the run continues without it" in notes[0]
