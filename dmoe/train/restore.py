"""Restoring a run: a model for one process, and the check whether a config fits a checkpoint.

A run is defined by its model, its data and its batches. What only changes speed, logging or
storage may differ when a run resumes; the learning rate and its schedule may too. Any other change
is refused by name, unless `checkpoint.accept_changes` lists it. A change that gives the model other
tensors is always refused, and never offered to be accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dmoe.checkpoint import save_load
from dmoe.config.changes import differences
from dmoe.config.errors import CheckpointError
from dmoe.config.load import load as load_config
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.plugins import is_under, parse, put
from dmoe.config.schema import Config
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import ParallelMesh, build_mesh
from dmoe.distributed.state_dict import model_state
from dmoe.models.base import Model
from dmoe.runs.directory import RunDir
from dmoe.train.engine import resolve_precision
from dmoe.train.modular.attach import attach_modules
from dmoe.train.tasks import Task, task_of

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RestoredModel:
    """A trained model in evaluation mode, with all its experts on one device."""

    config: Config
    model: Model
    task: Task
    step: int
    device: torch.device

    def autocast(self) -> torch.autocast:
        """Return the precision that the run was trained and evaluated in.

        float32 where this device does not have it.
        """
        wanted = self.config.train.precision
        lacking = wanted == "fp16" and self.device.type == "cpu"
        precision = (
            "fp32" if lacking else resolve_precision(wanted, self.device, self.config.model.dim)
        )
        return torch.autocast(
            self.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST
        )


def restore_model(
    run: RunDir,
    step: int | None = None,
    ep: int = 1,
    model: Model | None = None,
    *,
    trust_code: bool = False,
) -> RestoredModel:
    """Load the model of `run` after `step` steps, by default of its newest intact checkpoint.

    Whatever world and expert-parallel size the run had. Reads the weights only, no optimizer state.

    Args:
        run: the run directory.
        step: of the checkpoint.
        ep: 1 for one process with all experts; else collective, and each rank reads its own.
        model: of the user's, for a run that trained one.
        trust_code: load the code that the run names (`FILE.py:Name`); without it, refuse: whoever
            wrote the run directory chose that code.

    Raises: CheckpointError if there is no such checkpoint, or none that is intact; ConfigError if
    the tokenizer's file is missing.
    """
    config = load_config(run.path / "resolved.yaml")
    if trust_code:
        config = load_plugins(config)
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu"
    )
    mesh = build_mesh(ep, device) if ep > 1 else ParallelMesh()
    group, task = mesh.checkpoint_group, task_of(config)
    path = save_load.find(run.checkpoints, step, group=group)
    own = save_load.read_manifest_on_all(path, group=group).extra.get("model")
    if own is not None and model is None:
        call = f"dmoe.load(run, model={own}(...))"
        raise CheckpointError(f"{run.path} trained a model of your own: load it with {call}")
    if model is None:
        with torch.device("meta"):
            model = task.build_model()
            attach_modules(model, config)
        shard_experts(model, mesh)
        model.to_empty(device=device)
    else:
        shard_experts(model, mesh)
        model.to(device)
    state = model_state(model, mesh)
    filled = {name.removeprefix("model.") for name in state}
    unfilled = {n for n, _ in [*model.named_parameters(), *model.named_buffers()]} - filled
    # a published model makes buffers such as rotary frequencies itself
    assert not unfilled or config.model.source is not None, "a buffer that no checkpoint holds"
    extra = save_load.load(path, state, prefix="model.", group=group)
    return RestoredModel(config, model.eval(), task, int(extra["step"]), device)


FIXED_FIELDS = ("model", "moe", "modular", "train.task", "train.seed", "train.global_batch")
"""Sections and fields that define a run. Its data is compared by fingerprint."""


STATE_FIELDS = ("optim.kind", "optim.trainable", "moe.router.freeze")
"""Fields on which the tensors of the optimizer depend."""


FREE_FIELDS = (
    *("moe.exchange", "moe.kernels", "moe.replay.record"),
    *("modular.core", "modular.compositions"),
)
"""Fields of those sections that may differ: they change no number beyond rounding (the first two),
only write (record), or only the start or the end of a run (weights to start from, evaluation at the
end)."""


def check_same_run(saved: Mapping[str, Any], saved_data: str, config: Config, data: str) -> None:
    """Refuse a config that describes another run than the checkpoint's.

    Args:
        saved: the config in the checkpoint.
        saved_data: fingerprint of the data it was trained on.
        config: the config to resume with.
        data: fingerprint of the data to resume with.

    Raises:
        CheckpointError: naming the field, both values, and how to go on.
    """
    changed, before = list(differences(saved, asdict(config))), config
    for name, value, _ in changed:
        if parse(value, name) is None:  # code that a checkpoint names is not loaded
            before = put(before, name, value)
    refused = [
        change
        for change in changed
        if (is_under(change[0], FIXED_FIELDS) and not is_under(change[0], FREE_FIELDS))
        or change[0] in STATE_FIELDS
        or (saved_data != data and _is_data(change[0]))
        or _is_edited(*change)
    ]
    refused.sort(key=lambda change: _is_data(change[0]))
    shapes = tensor_shapes(config) if refused else None
    misfit = bool(refused) and shapes != tensor_shapes(before)
    for name, value, now in refused:
        reason = f"the checkpoint was trained with {value}"
        if _is_edited(name, value, now):
            old, new = parse(value, name), parse(now, name)
            assert old is not None
            assert new is not None
            now, fits = new.label, True
            reason = f"its file has changed: sha256 {new.digest}, in the checkpoint {old.digest}"
        else:
            fits = not misfit or shapes == tensor_shapes(put(config, name, value))
            fits = fits and name not in STATE_FIELDS and parse(value, name) is None
        _refuse(config, name, now, reason, fits)
    if saved_data != data and not any(_is_data(name) for name, _, _ in changed):
        reason = "its content is not what the checkpoint was trained on"
        _refuse(config, "data.source", config.data.source, reason, True)


def _is_edited(name: str, before: object, now: object) -> bool:
    """Return whether two values name one class of the user's own, in a file that has changed."""
    old, new = parse(before, name), parse(now, name)
    return old is not None and new is not None and old.label == new.label


def _refuse(config: Config, name: str, now: object, reason: str, fits: bool) -> None:
    """Raise CheckpointError for a field that differs, unless it is accepted and can be.

    Args:
        config: with the names that are accepted.
        name: the field.
        now: its value in `config`.
        reason: what differs.
        fits: whether the checkpoint's tensors fit a model with this value.
    """
    if is_under(name, ("modular",)):
        # Never acceptable: the tensors of the model and of the optimizer depend on it.
        raise CheckpointError(
            f"{name}={now}: {reason}; use that, or start another train.run_dir from this run, "
            "with modular.core"
        )
    if not fits:
        raise CheckpointError(
            f"{name}={now}: {reason}, whose tensors do not fit; use that, or another train.run_dir"
        )
    accepted = config.checkpoint.accept_changes
    if not is_under(name, accepted):
        names = ",".join([*accepted, name])
        raise CheckpointError(
            f"{name}={now}: {reason}; use that, or another train.run_dir, or accept it with "
            f"checkpoint.accept_changes=[{names}]"
        )


def _is_data(name: str) -> bool:
    return is_under(name, ("data",)) and name != "data.eval_source"


def tensor_shapes(config: Config) -> dict[str, torch.Size] | None:
    """Return the shape of each parameter and buffer of a config's model, without memory for them.

    None if no model can be built, e.g. because the tokenizer's file is gone.
    """
    try:
        with torch.device("meta"):
            model = task_of(config).build_model()
    except Exception:  # whatever values that were not checked together make the parts raise
        return None
    return {
        name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
