"""Restoring a run: a model for one process, and the check whether a config fits a checkpoint.

A run is defined by its model, its data and its batches. What only changes speed, logging or
storage may differ when a run resumes; the learning rate and its schedule may too. Any other change
is refused by name, unless `checkpoint.accept_changes` lists it. A change that gives the model other
tensors is always refused, and never offered to be accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dmoe.checkpoint import save_load
from dmoe.config.errors import CheckpointError
from dmoe.config.load import load as load_config
from dmoe.config.schema import Config, MoEConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import ParallelMesh, build_mesh
from dmoe.distributed.state_dict import model_state
from dmoe.models.base import Model
from dmoe.runs.directory import RunDir
from dmoe.train.engine import learning_rate, resolve_precision
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
    run: RunDir, step: int | None = None, ep: int = 1, model: Model | None = None
) -> RestoredModel:
    """Load the model of `run` after `step` steps, by default of its newest intact checkpoint.

    Whatever world and expert-parallel size the run had. Reads the weights only, no optimizer state.

    Args:
        run: the run directory.
        step: of the checkpoint.
        ep: 1 for one process with all experts; else collective, and each rank reads its own.
        model: of the user's, for a run that trained one.

    Raises: CheckpointError if there is no such checkpoint, or none that is intact; ConfigError if
    the tokenizer's file is missing.
    """
    config = load_config(run.path / "resolved.yaml")
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
    assert filled >= {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}, (
        "a buffer that no checkpoint holds"
    )
    extra = save_load.load(path, state, prefix="model.", group=group)
    return RestoredModel(config, model.eval(), task, int(extra["step"]), device)


FIXED_FIELDS = ("model", "moe", "modular", "train.task", "train.seed", "train.global_batch")
"""Sections and fields that define a run. Its data is compared by fingerprint."""


FREE_FIELDS = ("moe.exchange", "modular.core", "modular.compositions")
"""Fields of those sections that may differ: they change no number beyond rounding (exchange), or
only the start or the end of a run (weights to start from, evaluation at the end)."""


ABSENT = object()
"""Marks a field that the saved config does not have."""


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
    changed = list(_differences(saved, asdict(config)))
    before = config
    for name, value, _ in changed:
        before = _with_field(before, name, value)
    refused = [
        change
        for change in changed
        if (_is_under(change[0], FIXED_FIELDS) and not _is_under(change[0], FREE_FIELDS))
        or (saved_data != data and _is_data(change[0]))
    ]
    refused.sort(key=lambda change: _is_data(change[0]))
    shapes = tensor_shapes(config) if refused else None
    misfit = bool(refused) and shapes != tensor_shapes(before)
    for name, value, now in refused:
        fits = not misfit or shapes == tensor_shapes(_with_field(config, name, value))
        _refuse(config, name, now, f"the checkpoint was trained with {value}", fits)
    if saved_data != data and not any(_is_data(name) for name, _, _ in changed):
        reason = "its content is not what the checkpoint was trained on"
        _refuse(config, "data.source", config.data.source, reason, True)


def _refuse(config: Config, name: str, now: object, reason: str, fits: bool) -> None:
    """Raise CheckpointError for a field that differs, unless it is accepted and can be.

    Args:
        config: with the names that are accepted.
        name: the field.
        now: its value in `config`.
        reason: what differs.
        fits: whether the checkpoint's tensors fit a model with this value.
    """
    if _is_under(name, ("modular",)):
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
    if not _is_under(name, accepted):
        names = ",".join([*accepted, name])
        raise CheckpointError(
            f"{name}={now}: {reason}; use that, or another train.run_dir, or accept it with "
            f"checkpoint.accept_changes=[{names}]"
        )


def _is_data(name: str) -> bool:
    return _is_under(name, ("data",)) and name != "data.eval_source"


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


def _with_field(section: Any, name: str, value: object) -> Any:
    """Return a copy of a config with another value of the field of this dotted name."""
    first, _, rest = name.partition(".")
    return replace(
        section, **{first: _with_field(getattr(section, first), rest, value) if rest else value}
    )


SCHEDULE_FIELDS = (
    "train.steps",
    *(f"optim.{name}" for name in ("lr", "schedule", "warmup", "min_lr_ratio", "decay_fraction")),
)
"""Fields on which the learning rate depends. They may differ when a run resumes."""


def describe_learning_rate(saved: Mapping[str, Any], config: Config, step: int) -> str | None:
    """Describe a learning rate that does not go on where it was, or return None.

    A run that is made longer has another schedule, not the end of the old one: after a decay to a
    twentieth the rate would jump up again.

    Args:
        saved: the config in the checkpoint.
        config: the config to resume with.
        step: optimizer steps done.
    """
    names = [name for name, _, _ in _differences(saved, asdict(config)) if name in SCHEDULE_FIELDS]
    if not names or step >= config.train.steps:
        return None
    before = {name: saved.get("optim", {}).get(name) for name in vars(config.optim)}
    known = {name: value for name, value in before.items() if value is not None}
    steps = saved["train"]["steps"]
    old = learning_rate(min(step, steps - 1), steps, replace(config.optim, **known))
    new = learning_rate(step, config.train.steps, config.optim)
    if abs(new - old) <= 0.1 * old:
        return None
    changes = " and ".join(f"{name}={_value(config, name)}" for name in names)
    return (
        f"{changes}: the learning rate of step {step + 1} is {new:.3g}, not {old:.3g} as before; "
        f"optim.schedule=constant optim.warmup=0 optim.lr={old:.3g} keeps that one"
    )


def _value(section: Any, name: str) -> object:
    for part in name.split("."):
        section = getattr(section, part)
    return section


def describe_changes(
    saved: Mapping[str, Any], world_size: int, ep: int, micro_batch: int, moe: MoEConfig
) -> str | None:
    """Describe what a changed number of ranks or micro-batch size redefines, or return None.

    Token groups, which share a capacity or a switch loss, are micro-batches: consecutive sequences
    of the global batch, on whatever rank. So only their size counts.

    Args:
        saved: `world`, `ep` and `micro_batch` (sequences per virtual rank) of the checkpoint.
        world_size: number of ranks now.
        ep: expert-parallel size now.
        micro_batch: sequences per virtual rank now.
        moe: the section `moe` of the config now.
    """
    resharded = (saved["world"], saved["ep"]) != (world_size, ep)
    before = saved["micro_batch"]
    capacity, balance = moe.capacity, moe.balance
    per_micro_batch = {
        "capacity": capacity.factor is not None and capacity.group == "rank",
        "the switch loss": balance.switch > 0 and balance.switch_level == "micro_batch",
    }
    redefined = [name for name, applies in per_micro_batch.items() if applies]
    parts = []
    if resharded:
        parts.append(
            f"written by {saved['world']} ranks with EP {saved['ep']}, goes on with {world_size} "
            f"and EP {ep}: weights, moments and data order are the same"
        )
    if redefined and before != micro_batch:
        go = "goes" if len(redefined) == 1 else "go"
        parts.append(
            f"{' and '.join(redefined)} now {go} by groups of {micro_batch} sequences, "
            f"not {before} (train.micro_batch={before} keeps them)"
        )
    return "; ".join(parts) or None


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key, value in now.items():
        name, old = f"{prefix}{key}", before.get(key, ABSENT)
        if isinstance(value, dict):
            yield from _differences(old if isinstance(old, Mapping) else {}, value, f"{name}.")
        # A field that a newer version has added is absent: its default keeps the old meaning.
        elif old is not ABSENT and old != value:
            yield name, old, value


def _is_under(name: str, sections: tuple[str, ...] | list[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)
