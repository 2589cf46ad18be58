"""Sparse upcycling (Komatsuzaki et al. 2022): an MoE model that starts from a trained dense one.

    experts = made of the dense feed-forward (expert_copies.py);  router = new;  else = copied

With weights that sum to 1, `sum_k w_k f(x) = f(x)`: at step 0 the outputs of both models are equal,
whatever the router selects. So in the first step the router gets no gradient of the loss, since all
experts agree; only the load-balancing losses move it. Experts become different because each is
trained on the tokens routed to it, scaled by their weights; or because a share of each is drawn
anew, or has noise, which changes the outputs.

The dense model is a run of dmoe, or a published directory (Llama, SmolLM, Mistral, Qwen3).
Optimizer state and learning-rate schedule start from zero, as in the paper's default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dmoe.config.errors import ConfigError
from dmoe.config.load import load as load_config
from dmoe.config.load import to_yaml
from dmoe.config.plugins import put
from dmoe.config.rules import check
from dmoe.config.schema import Config, MoEConfig, ParallelConfig
from dmoe.conversion.expert_copies import COPIES, ExpertInit, copy_weights
from dmoe.conversion.new_run import first_extra, write_run
from dmoe.conversion.published_source import PublishedSource, open_published
from dmoe.conversion.upcycle_rules import check_upcycle
from dmoe.models.base import IGNORE_INDEX, Model, ModelOutput
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from dmoe.train.tasks import DataSplits, Task, task_of

__all__ = ["UpcycleResult", "check_upcycle", "copy_weights", "upcycle", "upcycle_published"]

NUM_CHECK_SEQUENCES = 16
SEQUENCES_PER_FORWARD = 4
OWN_FIELDS = ("model.moe_every", "model.dense_dim")
"""Fields of the mixture that a published dense model does not decide."""


@dataclass(frozen=True)
class UpcycleResult:
    """Result of `upcycle`; widths and counts are those of the new model.

    The field names are the keys of `dmoe checkpoint upcycle --json`.
    """

    path: str
    """The new run directory."""
    source: str
    step: int | None
    """Step of the dense run; None for a published model."""
    layers: list[str]
    """Names of the feed-forward layers that have become MoE layers."""
    experts: int
    dense_parameters: int
    parameters: int
    difference: float
    """Largest absolute difference of any logit on a few held-out sequences: rounding, unless an
    evaluation capacity drops tokens, or the experts were changed (drop, noise)."""
    dense_loss: float
    """Mean cross-entropy of the dense model on these sequences, in nats per token."""
    loss: float
    """The same of the new model."""
    init: ExpertInit = COPIES
    """How the experts were made."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one sentence each."""


@dataclass(frozen=True)
class _Dense:
    """A dense model to start from."""

    config: Config
    model: Model
    source: str
    step: int | None = None
    notes: tuple[str, ...] = ()


def upcycle(
    source: RunDir,
    config: Config,
    config_text: str,
    step: int | None = None,
    *,
    trust_code: bool = False,
    init: ExpertInit = COPIES,
) -> UpcycleResult:
    """Create the run of `config`, with a checkpoint of step 0 from which `dmoe train` continues.

    `dmoe train` may have any world and expert-parallel size. Cost: one process; memory of the dense
    weights and three times the sparse ones, since Adam's moments are saved as zeros.

    Args:
        source: run of a dense model.
        config: the config of the new run.
        config_text: text of its file, stored in the run directory.
        step: which checkpoint of `source`, by default the newest intact one.
        trust_code: load the code that `source` names.
        init: how the experts start.

    Raises:
        ConfigError: for models that do not fit, or a run directory in use.
        CheckpointError: if there is no intact checkpoint.
    """
    _check_one_process(config)
    dense_config = load_config(source.path / "resolved.yaml")
    check_upcycle(dense_config, config, init)
    dense = restore_model(source, step, trust_code=trust_code)
    start = _Dense(dense_config, dense.model.cpu(), str(source.path), dense.step)
    return _start(start, config, config_text, init)


def upcycle_published(
    folder: str | Path, config: Config, *, init: ExpertInit = COPIES
) -> UpcycleResult:
    """Create a run from a published dense model; see `upcycle`.

    Args:
        folder: of a Llama, SmolLM, Mistral or Qwen3, as `save_pretrained` writes it.
        config: of the new run; what the directory decides is filled in, the tokenizer too.
        init: how the experts start.

    Raises:
        ConfigError: for models that do not fit, or a run directory in use.
        CheckpointError: a tensor is missing or left over.
    """
    source = open_published(folder, "RUN")
    if source.model.family not in ("llama", "qwen3"):
        fix = "give a dense one, or use dmoe checkpoint import"
        raise ConfigError("RUN", folder, "is a mixture already", fix)
    dense_config = source.config(replace(Config(), data=config.data, train=config.train))
    config = _sparse_config(source, config, init)
    _check_one_process(config)
    check_upcycle(dense_config, config, init)
    model, notes = source.load(dense_config)
    start = _Dense(dense_config, model, str(folder), notes=tuple(notes))
    return _start(start, config, to_yaml(config), init)


def _sparse_config(source: PublishedSource, given: Config, init: ExpertInit) -> Config:
    """Return the config of the mixture, with the widths of the dense model where none is given."""
    config, width = source.config(given, OWN_FIELDS), source.model.fields["model.dense_dim"]
    if given.moe.expert_dim == MoEConfig.expert_dim and width % init.split == 0:
        config = put(config, "moe.expert_dim", width // init.split)
    if given.model.dense_dim is None:
        config = put(config, "model.dense_dim", width)
    return config


def _check_one_process(config: Config) -> None:
    """Check a config for one process: training may have any number of ranks."""
    check(replace(config, parallel=ParallelConfig(virtual_ranks=config.parallel.virtual_ranks)), 1)


def _start(dense: _Dense, config: Config, config_text: str, init: ExpertInit) -> UpcycleResult:
    task = task_of(config)
    data = task.open_data()
    with torch.device("meta"):  # or the constructor would draw all experts too
        model = task.build_model()
    model.to_empty(device="cpu")
    model.initialize(config.train.seed)
    layers = copy_weights(dense.model, model, init, config.train.seed)
    difference, dense_loss, loss = compare_models(dense.model, model, task, data)
    origin = dense.source if dense.step is None else f"{dense.source} step {dense.step}"
    path = write_run(config, config_text, model, first_extra(config, data, upcycled_from=origin))
    return UpcycleResult(
        str(path),
        dense.source,
        dense.step,
        layers,
        config.moe.num_experts,
        dense.model.num_parameters().total,
        model.num_parameters().total,
        difference,
        dense_loss,
        loss,
        init,
        dense.notes,
    )


@torch.no_grad()
def compare_models(
    before: Model, after: Model, task: Task, data: DataSplits, count: int = NUM_CHECK_SEQUENCES
) -> tuple[float, float, float]:
    """Compare two models on the first held-out sequences.

    Returns:
        The largest absolute difference of any logit, and the mean loss of each.
    """
    available, targets = data.held_out.num_sequences, 0
    count = count if available is None else min(count, available)
    difference, losses = 0.0, [0.0, 0.0]
    for first in range(0, count, SEQUENCES_PER_FORWARD):
        samples = task.samples(data.held_out, first, min(SEQUENCES_PER_FORWARD, count - first))
        context = samples.context()
        found = [
            model.eval()(samples.input, samples.target, context, return_logits=True)
            for model in (before, after)
        ]
        logits = [_logits(output) for output in found]
        difference = max(difference, float((logits[0] - logits[1]).abs().amax()))
        targets += int((samples.target != IGNORE_INDEX).sum())
        losses = [sum_ + float(out.loss_sum) for sum_, out in zip(losses, found, strict=True)]
    return difference, losses[0] / targets, losses[1] / targets


def _logits(output: ModelOutput) -> torch.Tensor:
    assert output.logits is not None
    return output.logits
