"""The directory of a run: plain files that people can read and compare."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.load import to_yaml
from dmoe.config.schema import Config, TrainConfig
from dmoe.config.secrets import redact


class RunDir:
    """`runs/NAME/` with `resolved.yaml`, `metrics.jsonl`, `checkpoints/` and `logs/`.

    `runs/latest` is a link to the newest one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.logs = path / "checkpoints", path / "logs"
        self.metrics = path / "metrics.jsonl"

    def create(self, given_path: str | None) -> None:
        """Create the directories. Raises ConfigError where that is not possible.

        `given_path`: `train.run_dir` as the user wrote it, for the message.
        """
        try:
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                "train.run_dir",
                given_path or self.path,
                f"cannot be written ({reason})",
                "choose a directory you may write to",
            ) from None

    def write_config(self, config: Config, config_text: str) -> None:
        """Write the config as given and as resolved, and link `latest` to this run.

        To be called once the run is known to fit the checkpoints in the directory. Secrets in the
        text (in a comment) are redacted; `dmoe.config.secrets` has refused those in fields.
        """
        (self.path / "config.yaml").write_text(redact(config_text), encoding="utf-8")
        (self.path / "resolved.yaml").write_text(redact(to_yaml(config)), encoding="utf-8")
        parent = self.path.parent
        if (parent / "checkpoints").is_dir() and (parent / "logs").is_dir():
            return  # the run of a base model, inside the run that starts from it: no link to it
        with suppress(OSError):  # the link is a convenience: the parent may be read-only
            self._link_latest()

    def _link_latest(self) -> None:
        link = self.path.parent / "latest"
        if link.is_symlink() or not link.exists():
            new_link = link.with_name(f".latest-{os.getpid()}")
            new_link.symlink_to(self.path.name)
            new_link.replace(link)


def name_run(config: TrainConfig) -> Path:
    """Return the path of a run: `train.run_dir`, or a new one under runs/ named by the time."""
    if config.run_dir:
        # Resolved, so that runs/latest is the run that it links to.
        return Path(os.path.realpath(Path(config.run_dir).expanduser()))
    base = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def find_run(path: str) -> RunDir:
    """Return the run at `path`, e.g. `runs/latest`. Raises ConfigError if there is none."""
    run = Path(path)
    if not (run / "resolved.yaml").is_file():
        raise ConfigError(
            "RUN",
            path,
            "is not a run directory (it has no resolved.yaml)",
            "give one, e.g. runs/latest",
        )
    return RunDir(run.resolve())
