"""wandb and TensorBoard, through accelerate."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from dmoe.config.schema import Config
from dmoe.training.run_dir import RunDir
from dmoe.training.telemetry import flatten

__all__ = ["Trackers"]


class Trackers:
    """The trackers that `tracking.trackers` names, on the main process only; `metrics.jsonl` does not depend on them."""

    def __init__(self, accelerator: Accelerator, config: Config, run: RunDir) -> None:
        self.accelerator = accelerator
        if accelerator.is_main_process:
            accelerator.trackers = [_open(name, config, run) for name in config.tracking.trackers]

    def log(self, values: dict[str, Any], step: int, prefix: str = "train/") -> None:
        for tracker in self._own():
            tracker.log(flatten(values, prefix), step=step)

    def close(self) -> None:
        """Not `Accelerator.end_training`: it destroys the process group, which the last barrier still needs."""
        for tracker in self._own():
            tracker.finish()

    def _own(self) -> list[GeneralTracker]:
        return self.accelerator.trackers if self.accelerator.is_main_process else []


def _open(name: str, config: Config, run: RunDir) -> GeneralTracker:
    if name == "tensorboard":
        board = TensorBoardTracker(run_name="tensorboard", logging_dir=run.logs)
        board.start()
        return board
    tracker = WandBTracker(
        run_name=config.tracking.project, name=run.path.name, dir=str(run.logs), mode=config.tracking.wandb_mode
    )
    tracker.start()
    tracker.store_init_configuration({"config": (run.path / "resolved.yaml").read_text(encoding="utf-8")})
    return tracker
