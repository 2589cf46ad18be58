"""aim, clearml, comet_ml, dvclive, mlflow, swanlab and trackio: accelerate's trackers for them.

Each start of a run opens a run of its own there, which begins at the step where the run continues.
`tracking.wandb_mode: online` lets comet_ml, clearml and swanlab connect to their servers; else they
write to the run directory, as aim, dvclive and, without MLFLOW_TRACKING_URI, mlflow do in any case;
trackio writes where it always does.
Alerts are a number 1 at their step: these libraries have no common text. Tables and images of the
load per expert go where the library has them: see `_FIGURES`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from accelerate import tracking

from dmoe.config.load import to_yaml
from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.observability.trackers.content import Extreme, LoadHistory, layer_name
from dmoe.observability.trackers.tensorboard import heat_map_image
from dmoe.runs.directory import RunDir

TABLE, IMAGES = "experts/hottest_and_coldest", "load_expert_by_step"


class AccelerateTracker:
    """One of accelerate's trackers, with the calls that `Trackers` makes.

    Args:
        name: in `tracking.trackers`.
        tracker: accelerate's, started.
    """

    def __init__(self, name: str, tracker: Any) -> None:
        self.name, self.tracker = name, tracker

    @classmethod
    def open(cls, name: str, config: Config, run: RunDir) -> AccelerateTracker:
        """Open a run. Raises whatever the library raises."""
        tracker = _OPEN[name](config, run)
        tracker.start()
        fields = {"config": redact(to_yaml(config))}
        if name == "mlflow":  # a parameter there has at most 6000 characters
            _mlflow().log_text(fields["config"], "config.yaml")
        else:
            tracker.store_init_configuration(fields)
        return cls(name, tracker)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the numbers of a step."""
        self.tracker.log(values, step=step)

    def alert(self, title: str, text: str, step: int) -> None:
        """Mark the step of an alert; its text is in metrics.jsonl and in the report."""
        self.log({f"alert/{title}": 1.0}, step)

    def log_figures(self, history: LoadHistory, step: int) -> None:
        """Send the load per expert, if the library shows tables or images."""
        if self.name in _FIGURES:
            _FIGURES[self.name](self.tracker, history, step)

    def finish(self) -> None:
        """End the run."""
        self.tracker.finish()


def _title(config: Config, run: RunDir) -> str:
    return redact(config.tracking.name or run.path.name)


def _is_online(config: Config) -> bool:
    return config.tracking.wandb_mode == "online"


def _directory(run: RunDir, name: str) -> str:
    path = run.logs / name
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def _mlflow() -> Any:
    import mlflow

    return mlflow


def _open_mlflow(config: Config, run: RunDir) -> Any:
    given = config.tracking
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        _mlflow().set_tracking_uri(f"sqlite:///{_directory(run, 'mlflow')}/mlflow.db")
    tags = {"group": given.group} if given.group else {}
    tags |= {redact(tag): "" for tag in given.tags}
    return tracking.MLflowTracker(
        experiment_name=given.project,
        run_name=_title(config, run),
        tags={name: redact(value) for name, value in tags.items()} or None,
        description=redact(given.notes) if given.notes else None,
    )


def _open_aim(config: Config, run: RunDir) -> Any:
    where = _directory(run, "aim")
    return tracking.AimTracker(
        _title(config, run), logging_dir=where, experiment=config.tracking.project
    )


def _open_comet(config: Config, run: RunDir) -> Any:
    tracker = tracking.CometMLTracker(config.tracking.project, online=_is_online(config))
    if not _is_online(config):
        os.environ.setdefault("COMET_OFFLINE_DIRECTORY", _directory(run, "comet_ml"))
    return tracker


def _open_clearml(config: Config, run: RunDir) -> Any:
    if not _is_online(config):
        from clearml import Task

        os.environ.setdefault("CLEARML_CACHE_DIR", _directory(run, "clearml"))
        Task.set_offline(offline_mode=True)
    return tracking.ClearMLTracker(
        config.tracking.project,
        task_name=_title(config, run),
        tags=[redact(tag) for tag in config.tracking.tags] or None,
        auto_connect_arg_parser=False,  # the command line may hold a secret
        auto_connect_streams=False,
    )


def _open_dvclive(config: Config, run: RunDir) -> Any:
    # no commit and no experiment in the user's repository
    where = _directory(run, "dvclive")
    return tracking.DVCLiveTracker(dir=where, save_dvc_exp=False, dvcyaml=None)


def _open_swanlab(config: Config, run: RunDir) -> Any:
    return tracking.SwanLabTracker(
        config.tracking.project,
        name=_title(config, run),
        description=redact(config.tracking.notes) if config.tracking.notes else None,
        mode="online" if _is_online(config) else "offline",
        log_dir=_directory(run, "swanlab"),
    )


def _open_trackio(config: Config, run: RunDir) -> Any:
    return tracking.TrackioTracker(
        config.tracking.project, name=_title(config, run), group=config.tracking.group
    )


_OPEN: dict[str, Callable[[Config, RunDir], Any]] = {
    "aim": _open_aim,
    "clearml": _open_clearml,
    "comet_ml": _open_comet,
    "dvclive": _open_dvclive,
    "mlflow": _open_mlflow,
    "swanlab": _open_swanlab,
    "trackio": _open_trackio,
}


def _images(history: LoadHistory) -> dict[str, Any]:
    """Return a heat map of each layer by name."""
    return {
        f"{layer_name(layer)}/{IMAGES}": heat_map_image(rows)
        for layer, (_, rows) in history.by_step().items()
    }


def _aim_figures(tracker: Any, history: LoadHistory, step: int) -> None:
    from PIL import Image

    images = {name: Image.fromarray(image) for name, image in _images(history).items()}
    tracker.log_images(images, step=step)


def _swanlab_figures(tracker: Any, history: LoadHistory, step: int) -> None:
    images = {name: [image] for name, image in _images(history).items()}
    tracker.log_images(images, step=step)


def _clearml_figures(tracker: Any, history: LoadHistory, step: int) -> None:
    rows = list(map(list, history.extremes()))
    tracker.log_table(TABLE, columns=list(Extreme._fields), data=rows, step=step)
    tracker.log_images(_images(history), step=step)


def _mlflow_figures(tracker: Any, history: LoadHistory, step: int) -> None:
    columns = zip(*history.extremes(), strict=True)
    table = dict(zip(Extreme._fields, map(list, columns), strict=True))
    table = {"step": [step] * len(table["layer"]), **table}
    _mlflow().log_table(data=table, artifact_file=f"{TABLE}.json")


_FIGURES: dict[str, Callable[[Any, LoadHistory, int], None]] = {
    "aim": _aim_figures,
    "clearml": _clearml_figures,
    "mlflow": _mlflow_figures,
    "swanlab": _swanlab_figures,
}
"""comet_ml, dvclive and trackio get the numbers of each expert only."""
