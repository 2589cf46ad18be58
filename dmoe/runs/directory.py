"""The directory of a run: plain files that a person can read and compare."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from dmoe.config.errors import ConfigError
from dmoe.config.load import to_yaml
from dmoe.config.schema import Config
from dmoe.config.secrets import redact
from dmoe.runs.metrics_log import MetricsFile


class RunDir:
    """`runs/NAME/` with `resolved.yaml`, `metrics.jsonl`, `checkpoints/`, `logs/`; `runs/latest` points at the newest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.logs, self.metrics = path / "checkpoints", path / "logs", path / "metrics.jsonl"

    def create(self, named: str | None) -> None:
        """Make the directories. Raises ConfigError where that is not possible; `named` is `train.run_dir` as the user gave it."""
        try:
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                "train.run_dir", named or self.path, f"cannot be written ({reason})", "choose a directory you may write to"
            ) from None

    def record(self, config: Config, given: str) -> None:
        """Write the config, as given and resolved, and point `latest` here: once the run is known to fit what the directory holds.

        A secret in what was given (a comment) is left out; `dmoe.config.secrets` has refused one in a field.
        """
        (self.path / "config.yaml").write_text(redact(given), encoding="utf-8")
        (self.path / "resolved.yaml").write_text(redact(to_yaml(config)), encoding="utf-8")
        if (self.path.parent / "checkpoints").is_dir() and (self.path.parent / "logs").is_dir():
            return  # a core, in the directory of the run that starts from it: people look for that one
        with suppress(OSError):  # a convenience: a parent that may not be written is no reason not to train
            self._point_latest()

    def _point_latest(self) -> None:
        link = self.path.parent / "latest"
        if link.is_symlink() or not link.exists():
            fresh = link.with_name(f".latest-{os.getpid()}")
            fresh.symlink_to(self.path.name)
            fresh.replace(link)


def name_run(config: Config) -> Path:
    """Where this run goes: `train.run_dir`, or a new directory under runs/ named by the time."""
    if config.train.run_dir:
        return Path(os.path.realpath(Path(config.train.run_dir).expanduser()))  # runs/latest is the run it points to
    base = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def find_run(path: str) -> RunDir:
    """The run at `path`, e.g. `runs/latest`. Raises ConfigError if there is none."""
    run = Path(path)
    if not (run / "resolved.yaml").is_file():
        raise ConfigError("RUN", path, "is not a run directory (it has no resolved.yaml)", "give one, e.g. runs/latest")
    return RunDir(run.resolve())
