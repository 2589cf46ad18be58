"""Training stages: `modular.core` may name a config file, whose model is trained first.

The same command trains it on the same ranks, into RUN/core. Its config may name a base model too.
A finished stage is not trained again; an interrupted one is resumed.
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
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.rules import check
from dmoe.config.schema import Config
from dmoe.config.shipped import find_config
from dmoe.config.yaml_guard import read_text
from dmoe.data.tables import fill_table_shape
from dmoe.train.modular.base_model import check_base_model

BASE_MODEL_DIR = "core"
"""Run directory of the base model, inside that of the run that starts from it."""
MAX_DEPTH = 8
DEFAULT_HANDLERS: dict[signal.Signals, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGUSR1: signal.SIG_IGN,
}
"""Signal handlers between two runs, when ranks cannot agree on a step to stop at."""
TrainFn = Callable[[Config, str], None]
"""Trains a config; the second argument is its text. Raises StopRequested."""


def is_config_file(core: str | None) -> bool:
    """Return True if this value of `modular.core` is a config file, to be trained first."""
    return core is not None and core.endswith((".yaml", ".yml"))


def base_model_config(config: Config) -> tuple[Config, str]:
    """Return the config that `modular.core` names, and its text. Raises ConfigError."""
    assert config.modular.core is not None
    path = find_config(config.modular.core)
    if not Path(path).is_file() and not Path(path).is_absolute():
        allowed = f"is not in {Path.cwd()}, where this command runs"
        raise ConfigError(
            "modular.core", path, allowed, "run it where the path begins, or give an absolute path"
        )
    text = read_text(path)
    return fill_table_shape(load_plugins(load_text(text, path))), text


def check_base_models(config: Config, world: int, depth: int = 0) -> None:
    """Check the base model, and its base model in turn. Raises ConfigError.

    It must exist, be trainable and be the same network. A run with a checkpoint does not need it.
    """
    path = config.modular.core
    if path is None or _has_checkpoint(config):
        return
    if not is_config_file(path):
        check_base_model(config, _recorded_config(path), path)
        return
    if depth == MAX_DEPTH:
        allowed = f"names base models that start from each other, or more than {MAX_DEPTH}"
        raise ConfigError(
            "modular.core", config.modular.core, allowed, "leave modular.core of the first one out"
        )
    base, _ = base_model_config(config)
    check(base, world)
    check_base_model(config, asdict(base), path)
    check_base_models(base, world, depth + 1)


def _has_checkpoint(config: Config) -> bool:
    run = config.train.run_dir
    return run is not None and any((Path(run).expanduser() / "checkpoints").glob("step-*"))


def _recorded_config(core: str) -> Mapping[str, Any]:
    """Return the config recorded in a run or checkpoint; empty if a checkpoint records none."""
    source = Path(core).expanduser()
    if (source / "manifest.json").is_file():
        found = read(source).extra.get("config")
        return found if isinstance(found, dict) else {}
    if not (source / "resolved.yaml").is_file():
        allowed = "is neither a run, nor a checkpoint, nor a config file (*.yaml)"
        raise ConfigError("modular.core", core, allowed, "give one, e.g. runs/latest")
    return asdict(load(source / "resolved.yaml"))


def needs_base_model(config: Config, run: Path) -> bool:
    """Return True if the base model must be trained before the run in this directory.

    Raises: CheckpointError for an incomplete checkpoint of either run.
    """
    if (
        not is_config_file(config.modular.core)
        or save_load.find_latest(run / "checkpoints") is not None
    ):
        return False
    newest = save_load.find_latest(run / BASE_MODEL_DIR / "checkpoints")
    return newest is None or read(newest).step < base_model_config(config)[0].train.steps


def train_base_model(config: Config, run: Path, train: TrainFn) -> None:
    """Train the base model into `run`/core. Raises StopRequested after a stop of that run."""
    base, text = base_model_config(config)
    try:
        train(replace(base, train=replace(base.train, run_dir=str(run / BASE_MODEL_DIR))), text)
    finally:
        # accelerate expects one Accelerator per process and refuses another precision in a second
        AcceleratorState._reset_state(reset_partial_state=True)
        for number, action in DEFAULT_HANDLERS.items():
            signal.signal(number, action)
