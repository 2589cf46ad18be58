"""A core that has to be trained first: `modular.core` names a config file.

It is trained by the same command, on the same ranks, into RUN/core, and its config may name a core of its own. A stage that is finished
is not trained again; one that was interrupted is resumed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from dmoe.checkpoint import save_load
from dmoe.checkpoint.manifest import read
from dmoe.config.errors import ConfigError
from dmoe.config.load import load, load_text
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.config.yaml_guard import read_text
from dmoe.train.modular.base_model import check_base_model

BASE_MODEL_DIR = "core"
"""The directory of the core's run, in that of the run that starts from it."""
MAX_DEPTH = 8
DEFAULT_HANDLERS: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGUSR1: signal.SIG_IGN,
}
"""Between two runs nobody agrees on steps: a signal does what it did before the first."""
TrainFn = Callable[[Config, str], int]
"""Trains a config, whose text is given too; the signal that stopped it, or 0."""


def is_config_file(core: str | None) -> bool:
    return core is not None and core.endswith((".yaml", ".yml"))


def base_model_config(config: Config) -> tuple[Config, str]:
    """The config file that `modular.core` names, and its text. Raises ConfigError."""
    path = config.modular.core
    assert path is not None
    if not Path(path).is_file() and not Path(path).is_absolute():
        allowed = f"is not in {Path.cwd()}, where this command runs"
        raise ConfigError(
            "modular.core", path, allowed, "run it where the path begins, or give the whole path"
        )
    text = read_text(path)
    return load_text(text, path), text


def check_base_models(config: Config, world: int, depth: int = 0) -> None:
    """Refuse a core, or a core of it, that is not there, cannot be trained or is another network. Raises ConfigError.

    A run that has a checkpoint of its own needs its core no more.
    """
    path = config.modular.core
    if path is None or _has_checkpoint(config):
        return
    if not is_config_file(path):
        check_base_model(config, _recorded_config(path), path)
        return
    if depth == MAX_DEPTH:
        allowed = f"names cores that start from each other, or more than {MAX_DEPTH} of them"
        raise ConfigError(
            "modular.core", config.modular.core, allowed, "leave modular.core of the first one out"
        )
    core, _ = base_model_config(config)
    check(core, world)
    check_base_model(config, asdict(core), path)
    check_base_models(core, world, depth + 1)


def _has_checkpoint(config: Config) -> bool:
    run = config.train.run_dir
    return run is not None and any((Path(run).expanduser() / "checkpoints").glob("step-*"))


def _recorded_config(core: str) -> Mapping[str, Any]:
    """The config of the core at this path, as far as it says."""
    place = Path(core).expanduser()
    if (place / "manifest.json").is_file():
        found = read(place).extra.get("config")
        return found if isinstance(found, dict) else {}
    if not (place / "resolved.yaml").is_file():
        allowed = "is neither a run, nor a checkpoint, nor a config file (*.yaml)"
        raise ConfigError("modular.core", core, allowed, "give one, e.g. runs/latest")
    return asdict(load(place / "resolved.yaml"))


def needs_base_model(config: Config, run: Path) -> bool:
    """Whether the core has to be trained before the run in this directory can go on. Collective: rank 0 looks.

    Raises: CheckpointError where a checkpoint of either is not whole.
    """
    if (
        not is_config_file(config.modular.core)
        or save_load.find_latest(run / "checkpoints") is not None
    ):
        return False
    newest = save_load.find_latest(run / BASE_MODEL_DIR / "checkpoints")
    return newest is None or read(newest).step < base_model_config(config)[0].train.steps


def train_base_model(config: Config, run: Path, train: TrainFn) -> int:
    """Train the core into its place; the signal that stopped it, or 0."""
    core, text = base_model_config(config)
    try:
        return train(replace(core, train=replace(core.train, run_dir=str(run / BASE_MODEL_DIR))), text)
    finally:
        # accelerate expects one Accelerator a process, and refuses a second with another precision
        AcceleratorState._reset_state(reset_partial_state=True)
        for number, action in DEFAULT_HANDLERS.items():
            signal.signal(number, action)
