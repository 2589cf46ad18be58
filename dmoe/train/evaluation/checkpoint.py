"""Evaluate a checkpoint of a run, as its training did or on other text.

    perplexity = exp(loss per token);   bits per byte = loss / ln 2 / bytes of the targets

Perplexity is comparable between models of one tokenizer only, bits per byte between all.

Letters: E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint import save_load
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.load import load as load_config
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import batching, check
from dmoe.config.schema import Config
from dmoe.data.whole_text import open_whole_text
from dmoe.distributed.gradients import all_reduce_sum
from dmoe.distributed.init import ProcessInfo, init_distributed
from dmoe.distributed.state_dict import model_state
from dmoe.models.base import Model, ModelOutput
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import read_metrics
from dmoe.train.engine import Engine, build_engine
from dmoe.train.evaluation import Evaluation, evaluate
from dmoe.train.tasks import DataSplits, task_of

GIVEN = "given to dmoe.train"
"""Value of `data.source` in the run directory, if the data were given."""


@dataclass(frozen=True)
class RunEvaluation:
    """Result of `evaluate_run`, equal on all ranks."""

    step: int
    """Of the checkpoint."""
    unit: str
    """Word for a target: token or sample."""
    data: str
    """Description of the data."""
    evaluation: Evaluation
    layers: list[dict[str, Any]]
    """Per MoE layer `load` (assignments of each expert before any drop), `load_max_over_mean` and
    `drop_rate` (share of the assignments that no expert computed)."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per target."""
        return self.evaluation.loss

    @property
    def metrics(self) -> dict[str, float]:
        """bits_per_byte and perplexity of text; accuracy of a classifier."""
        return self.evaluation.metrics | self._perplexity(self.loss)

    @property
    def by_domain(self) -> dict[str, dict[str, float]]:
        """Loss, metrics and targets (`tokens`) of each domain, if there are several."""
        return {
            name: values | self._perplexity(values["loss"])
            for name, values in self.evaluation.by_domain.items()
        }

    def _perplexity(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))} if self.unit == "token" else {}

    def record(self) -> dict[str, Any]:
        """Return everything as plain values, with the names of an `eval` line."""
        values: dict[str, Any] = {"step": self.step, "loss": self.loss, **self.metrics}
        values |= {"tokens": self.evaluation.targets, "data": self.data}
        parts = {"by_domain": self.by_domain, "missing": self.evaluation.missing_stream_accuracy}
        return (
            values | {name: part for name, part in parts.items() if part} | {"layers": self.layers}
        )


def evaluate_run(
    run: RunDir,
    step: int | None = None,
    *,
    source: str | None = None,
    data: DataSplits | None = None,
    sequences: int | None = None,
    model: Model | None = None,
    trust_code: bool = False,
) -> RunEvaluation:
    """Evaluate a checkpoint, as one process or as every rank of a job. Collective.

    With the sequences per forward of the training, since tokens of one forward may share experts:
    then the result is the one that the training logged, bit for bit on as many ranks.

    Args:
        run: the run directory; nothing is written there.
        step: of the checkpoint; None: the newest that is intact.
        source: text to evaluate whole, as `data.source`; None: the held-out split of the run.
        data: the splits, in place of both.
        sequences: how many, from the first; None: all of `source`, else `train.eval_sequences`.
        model: of the user's, for a run that trained one.
        trust_code: load the code that the run names (`FILE.py:Name`), for a run that you trust.

    Raises:
        ConfigError: the data cannot be read, or the ranks do not fit the experts.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    config = load_config(run.path / "resolved.yaml")
    if trust_code:
        config = load_plugins(config)
    splits = _open_data(config, source) if data is None else data
    if sequences is None and source is not None:
        sequences = splits.held_out.num_sequences
    process = init_distributed(
        config.train.device, config.parallel.backend, config.parallel.start_timeout
    )
    config = _config_for(config, run, process, sequences)
    check(config, process.world_size)
    engine = _load_engine(config, run, step, process, model)
    counter = _LoadCounter()
    try:
        evaluation = evaluate(engine.engine, splits, update=counter.add)
        layers = counter.report(engine.engine)
    finally:
        engine.engine.close()
    unit = engine.engine.task.unit
    return RunEvaluation(engine.step, unit, splits.describe(), evaluation, layers)


@dataclass(frozen=True)
class _LoadedEngine:
    engine: Engine
    step: int


def _open_data(config: Config, source: str | None) -> DataSplits:
    if source is None:
        if config.data.source == GIVEN:
            allowed = "the run was trained on data that a Python program gave"
            raise ConfigError("--data", None, allowed, "name a text, or use dmoe.evaluate(data=)")
        splits: DataSplits = task_of(config).open_data()
        return splits
    kind = config.moe.router.kind
    if config.train.task != "language_modelling":
        allowed = "is for language models; this run is a classifier"
        raise ConfigError("--data", source, allowed, "leave it out for its held-out samples")
    if router_spec(kind).needs == "label_T":
        allowed = f"has no labels for moe.router.kind={kind}, which goes by those of the run's data"
        raise ConfigError("--data", source, allowed, "leave it out for the held-out split")
    return open_whole_text(config.data, config.train.seed, source)


def _config_for(config: Config, run: RunDir, process: ProcessInfo, sequences: int | None) -> Config:
    """Return the config for these ranks, with the forwards of the training."""
    world = process.world_size
    lines = read_metrics(run.metrics) if run.metrics.exists() else []
    trained = [line.get("world") for line in lines if line["event"] in ("start", "restart")]
    before = trained[-1] if trained and isinstance(trained[-1], int) else 1
    micro_batch = batching(config, before).micro_batch
    parallel, train = config.parallel, config.train
    if isinstance(parallel.ep, int) and world % parallel.ep:
        parallel = replace(parallel, ep="auto")
    if world == 1:
        parallel = replace(parallel, mode="ddp")
    if process.device.type == "cpu":  # a library moves rows between GPUs
        parallel = replace(parallel, exchange=replace(parallel.exchange, library="torch"))
    train = replace(
        train,
        micro_batch=micro_batch,
        offload="none",  # there is no backward, and a CPU refuses it
        global_batch=micro_batch * world * parallel.virtual_ranks,
        eval_sequences=train.eval_sequences if sequences is None else sequences,
    )
    optim = replace(config.optim, offload=False)
    return replace(config, parallel=parallel, train=train, optim=optim)


def _load_engine(
    config: Config, run: RunDir, step: int | None, process: ProcessInfo, model: Model | None
) -> _LoadedEngine:
    """Build the engine without a warm-up, and load the weights of the checkpoint."""
    engine = build_engine(
        config, process, task_of(config).num_outputs, model=model, is_trained=False
    )
    group = engine.mesh.checkpoint_group
    path = save_load.find(run.checkpoints, step, group=group)
    own = save_load.read_manifest_on_all(path, group=group).extra.get("model")
    if own is not None and model is None:
        call = f"dmoe.evaluate(run, model={own}(...))"
        raise CheckpointError(f"{run.path} trained a model of your own: evaluate it with {call}")
    state = model_state(engine.model, engine.mesh)
    extra = save_load.load(path, state, prefix="model.", group=group)
    return _LoadedEngine(engine, int(extra["step"]))


class _LoadCounter:
    """Sums of the layers' counts over the batches of this rank."""

    def __init__(self) -> None:
        self.counts: list[tuple[Tensor, Tensor]] = []

    def add(self, output: ModelOutput, label_T: Tensor, valid_T: Tensor) -> None:
        """Add the choices and the computed rows of one forward. No host read."""
        new = [(stats.choice_E, stats.kept_E) for stats in output.stats]
        if self.counts:
            pairs = zip(self.counts, new, strict=True)
            new = [(c + choice, k + kept) for (c, k), (choice, kept) in pairs]
        self.counts = new

    def report(self, engine: Engine) -> list[dict[str, Any]]:
        """Return the `layers` of a result. Collective: one reduction per layer."""
        layers = []
        for index, (choice_E, kept_E) in enumerate(self.counts):
            sums = all_reduce_sum(torch.cat([choice_E, kept_E]).double(), engine.mesh).tolist()
            load, kept = sums[: len(choice_E)], sum(sums[len(choice_E) :])
            total = sum(load)
            layers.append(
                {
                    "layer": index,
                    "load": [int(count) for count in load],
                    "load_max_over_mean": max(load) * len(load) / total if total else 0.0,
                    "drop_rate": (total - kept) / total if total else 0.0,
                }
            )
        return layers
