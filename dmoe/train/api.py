"""Runs from Python: train one, read its numbers, and get its model back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from dmoe.checkpoint import save_load
from dmoe.config.errors import ConfigError, DmoeError
from dmoe.config.load import load_text, to_yaml
from dmoe.config.schema import Config
from dmoe.config.shipped import find_config
from dmoe.config.yaml_guard import read_text
from dmoe.data import open_documents
from dmoe.distributed.init import barrier
from dmoe.distributed.launcher import handled_stop_signals
from dmoe.models.base import Model
from dmoe.runs import metrics_log
from dmoe.runs.directory import RunDir, find_run
from dmoe.train.callbacks import Callback
from dmoe.train.evaluation.checkpoint import GIVEN, RunEvaluation, evaluate_run
from dmoe.train.restore import restore_model
from dmoe.train.run import train_run
from dmoe.train.tasks import DataSplits


class Metrics(list[dict[str, Any]]):
    """Lines of metrics.jsonl in force, one dict each, with `event` and `step`."""

    def of(self, event: str) -> Metrics:
        """Return the lines of one event: train, eval, checkpoint, alert, start, restart, end."""
        return Metrics(line for line in self if line["event"] == event)

    def to_pandas(self) -> Any:
        """Return a DataFrame, nested values as columns like `aux.switch`. Needs pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise DmoeError("to_pandas() needs pandas: pip install pandas") from None
        return pd.json_normalize(list(self))


class Run:
    """A run directory, and its model.

    Args:
        path: the directory, e.g. `runs/latest`.
        model: the trained model, if this process has trained it.
        stopped: whether it ended before its last step, by a signal or a callback.
    """

    def __init__(
        self, path: str | Path, model: nn.Module | None = None, stopped: bool = False
    ) -> None:
        self._directory: RunDir = find_run(str(path))
        self._model, self.stopped = model, stopped

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def metrics(self) -> Metrics:
        """What the run has logged until now."""
        return read_metrics(self)

    @property
    def model(self) -> nn.Module:
        """The model in evaluation mode: as trained here, on several ranks with the experts of this
        one, so that its forward is collective; else that of the newest checkpoint (`load`)."""
        if self._model is None:
            self._model = load(self)
        return self._model

    def checkpoint(self, step: int | None = None) -> Path:
        """Return the checkpoint of a step, by default the newest. Raises DmoeError without one."""
        return save_load.find(self._directory.checkpoints, step)

    def report(self, output: str | Path | None = None) -> Path:
        """Write the report, by default report.html in the run directory; return its path."""
        from dmoe.report import write_report

        return write_report([self.path], Path(output or self.path / "report.html"))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"


def train(
    config: Config | str | Path,
    *,
    callbacks: Sequence[Callback] = (),
    data: DataSplits | Sequence[str | bytes] | None = None,
    model: Model | None = None,
    quiet: bool = False,
) -> Run:
    """Train as `config` says; as one process, or on every rank of a launcher or process group.

    Returns when the run has ended, also after a stop (`Run.stopped`). Under a launcher without a
    process group it starts one and leaves it open, since `Run.model` needs it. Signal handlers and
    accelerate's state are restored; torch's generators are seeded with `train.seed`.

    Args:
        config: a `Config`, the path of a YAML file, or the name of a shipped one.
        callbacks: of this rank; called on this rank.
        data: texts, one per document, to tokenize, split and pack by `config.data`; or an object
            with the splits, such as `dmoe.data.DatasetSplits`. None: `data.source`.
        model: a `Model` to train in place of the config's, with its weights.
        quiet: print notes, alerts and the run directory only.

    Raises:
        DmoeError: see `dmoe.train.run.train_run`; after the error of a callback, on all ranks.
    """
    _check_given(callbacks, data)
    if isinstance(config, Config):
        text = to_yaml(config)
    else:
        path = find_config(str(config))
        text = read_text(path)
        config = load_text(text, path)
    splits: Any = data
    if data is not None:
        given = replace(config.data, source=GIVEN)
        if isinstance(data, Sequence):
            splits = open_documents(given, config.train.seed, data)
        config = replace(config, data=given)
    with _own_process_state():
        ended = train_run(config, text, quiet, callbacks=callbacks, data=splits, model=model)
        barrier()
    return Run(ended.path, ended.model and ended.model.eval(), ended.stop_signal is not None)


def _check_given(callbacks: object, data: object) -> None:
    """Refuse callbacks and texts of another type, before anything is written."""
    listed = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in listed:
        if listed is not callbacks or not isinstance(callback, Callback):
            allowed = "must be a list of dmoe.Callback objects"
            raise ConfigError("callbacks", type(callback).__name__, allowed, "see docs/api.md")
    if isinstance(data, str | bytes):
        raise ConfigError("data", type(data).__name__, "must be a list of texts", "use [text]")
    for number, text in enumerate(data if isinstance(data, Sequence) else ()):
        if not isinstance(text, str | bytes):
            allowed = f"must be str or bytes, but text {number} is not"
            raise ConfigError("data", type(text).__name__, allowed, "give one text per document")


def load(
    run: Run | str | Path,
    step: int | None = None,
    *,
    ep: int = 1,
    model: Model | None = None,
    trust_code: bool = False,
) -> Model:
    """Return the model of a run in evaluation mode, whatever world and EP size the run had.

    Args:
        run: a `Run`, or a run directory.
        step: of the checkpoint; None: the newest that is intact.
        ep: 1: all experts on this process. More: those of this rank, which alone are read.
        model: to fill, for a run that trained a model of yours.
        trust_code: load the code that the run names (`FILE.py:Name`), for a run that you trust.

    In a process group every rank must call it.

    Raises:
        DmoeError: there is no such checkpoint, or it is damaged.
    """
    directory = run._directory if isinstance(run, Run) else find_run(str(run))
    return restore_model(directory, step, ep, model, trust_code=trust_code).model


def evaluate(
    run: Run | str | Path,
    step: int | None = None,
    *,
    data: DataSplits | str | None = None,
    sequences: int | None = None,
    model: Model | None = None,
    trust_code: bool = False,
) -> RunEvaluation:
    """Evaluate a checkpoint of a run: loss, metrics by domain, load and drops of each layer.

    In a process group, or under a launcher, every rank must call it.

    Args:
        run: a `Run`, or a run directory.
        step: of the checkpoint; None: the newest that is intact.
        data: text to evaluate whole, as `data.source`, or an object with the splits, whose
            `held_out` is read; None: the held-out split of the run.
        sequences: how many, from the first; None: all of a text, else `train.eval_sequences`.
        model: a model of yours to fill, for a run that trained one.
        trust_code: load the code that the run names (`FILE.py:Name`), for a run that you trust.

    Raises:
        DmoeError: there is no such checkpoint, it is damaged, or the data cannot be read.
    """
    directory = run._directory if isinstance(run, Run) else find_run(str(run))
    source, splits = (data, None) if isinstance(data, str) else (None, data)
    with _own_process_state():
        return evaluate_run(
            directory,
            step,
            source=source,
            data=splits,
            sequences=sequences,
            model=model,
            trust_code=trust_code,
        )


def read_metrics(run: Run | str | Path) -> Metrics:
    """Read what a run has logged, each step once, however often it was resumed."""
    directory = run._directory if isinstance(run, Run) else find_run(str(run))
    return Metrics(metrics_log.read_metrics(directory.metrics))


@contextmanager
def _own_process_state() -> Iterator[None]:
    """Restore the signal handlers, accelerate's state and torch's choice of kernels."""
    on_main = threading.current_thread() is threading.main_thread()
    numbers = [*handled_stop_signals(), signal.SIGUSR1] if on_main else []
    handlers = {number: signal.getsignal(number) for number in numbers}
    deterministic = torch.are_deterministic_algorithms_enabled()
    shared = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, values in zip(shared, before, strict=True):
            state.clear()
            state.update(values)
        torch.use_deterministic_algorithms(deterministic)
        for number, handler in handlers.items():
            signal.signal(number, handler)
