"""The operations of `dmoe modules`: list, export, add and merge the modules of a run.

They run in one process, which holds all experts and all modules. A new run directory contains
weights but no optimizer state. `dmoe generate` and `dmoe modules` read it, and another run starts
from it by `modular.core=DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import dmoe
from dmoe.checkpoint import save_load
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.load import to_yaml
from dmoe.config.schema import Config, ModularConfig
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state
from dmoe.modular import (
    adapter_layers,
    add_modules,
    base_model_hash,
    export_peft,
    inspect_modules,
    merge,
    save_modules,
)
from dmoe.modular.attach import CHILD
from dmoe.runs.directory import RunDir
from dmoe.train.restore import RestoredModel, restore_model


@dataclass(frozen=True)
class TargetSummary:
    """The adapter layer of one target module. Field names are those of `--json`."""

    place: str
    bank: str
    router: str
    aggregation: str
    modules: int
    parameters: int
    """Number of parameters of the bank."""


def list_modules(source: Path, *, trust_code: bool = False) -> list[TargetSummary]:
    """List the modules of a run or of a module file.

    Raises: ConfigError for a run without modules; CheckpointError for any other file.
    """
    if source.is_file():
        saved = inspect_modules(source).targets
        summary: Any = TargetSummary
        return [summary(name, **fields) for name, fields in saved.items()]
    found = _restore_with_modules(RunDir(source), trust_code)
    return [
        TargetSummary(
            name,
            type(layer.experts).__name__,
            type(layer.router).__name__,
            type(layer.aggregation).__name__,
            layer.experts.num_modules,
            sum(parameter.numel() for parameter in layer.experts.parameters()),
        )
        for name, layer in adapter_layers(found.model).items()
    ]


def export_modules(run: RunDir, to: Path, *, trust_code: bool = False) -> str:
    """Write the modules into a file and return the hash of their base model."""
    found = _restore_with_modules(run, trust_code)
    base_model = base_model_hash(found.model)
    _report_write_errors("--to", to, lambda: save_modules(found.model, to, base_model=base_model))
    return base_model


def export_module_to_peft(
    run: RunDir, module: int, folder: Path, *, trust_code: bool = False
) -> None:
    """Write one low-rank module of every target in peft's format.

    Raises: ConfigError for another kind of bank, or an unknown module.
    """
    found = _restore_with_modules(run, trust_code)
    _check_module(found.config.modular, module)
    _report_write_errors("--peft", folder, lambda: export_peft(found.model, module, folder))


def merge_run(run: RunDir, weights: Sequence[float], to: Path, *, trust_code: bool = False) -> None:
    """Write a run directory with the modules merged into the weights of the base model.

    Raises: ConfigError unless there is one weight per module and every target can be merged. Then
    nothing is written.
    """
    found = _restore_with_modules(run, trust_code)
    if len(weights) != found.config.modular.modules:
        allowed = f"must be one number for each of the {found.config.modular.modules} modules"
        raise ConfigError("--weights", ",".join(map(str, weights)), allowed, "e.g. 0.5,0.5 for two")
    _check_new_directory(to)
    merge(found.model, weights)
    _write_run(found, ModularConfig(), to)


def add_modules_to_run(
    run: RunDir, files: Sequence[Path], to: Path, *, trust_code: bool = False
) -> int:
    """Write a run directory with the run's modules, then those of the files; return their number.

    Routers are not trained for the new modules: a learned one gets new rows, constant weights are
    0, a table does not contain them.

    Raises: CheckpointError for modules of another base model, or that do not fit. Then nothing is
    written.
    """
    found = _restore_with_modules(run, trust_code)
    _check_new_directory(to)
    base_model, count = base_model_hash(found.model), 0
    for file in files:
        count += _check_file(found, file, base_model)
    before = found.config.modular.modules
    add_modules(found.model, count, seed=found.config.train.seed)
    first = before
    for file in files:
        first += _copy_file(found, file, first)
    modular = found.config.modular
    weights = modular.weights or [1.0 / before] * before
    if modular.routing == "constant":
        modular = replace(modular, weights=[*weights, *[0.0] * count])
    _write_run(found, replace(modular, modules=first), to)
    return first


def _restore_with_modules(run: RunDir, trust_code: bool = False) -> RestoredModel:
    found = restore_model(run, trust_code=trust_code)
    if found.config.modular.bank == "none":
        raise ConfigError(
            "RUN",
            run.path,
            "has no modules (modular.bank=none)",
            "train one with modular.bank=low_rank",
        )
    return found


def _check_module(modular: ModularConfig, module: int) -> None:
    if not 0 <= module < modular.modules:
        raise ConfigError(
            "--module",
            module,
            f"the run has the modules 0 to {modular.modules - 1}",
            "name one of them",
        )


def _check_file(found: RestoredModel, file: Path, base_model: str) -> int:
    """Return the number of modules in the file. Raises CheckpointError unless they fit the run."""
    saved, layers = inspect_modules(file), adapter_layers(found.model)
    if saved.base_model != base_model:
        raise CheckpointError(
            f"{file}: its modules belong to another base model ({saved.base_model[:12]}, "
            f"the run's is {base_model[:12]})"
        )
    if sorted(saved.targets) != sorted(layers):
        raise CheckpointError(
            f"{file}: has modules at {', '.join(sorted(saved.targets))}, "
            f"the run at {', '.join(sorted(layers))}"
        )
    with safe_open(file, framework="pt") as content:
        for target, layer in layers.items():
            kind = saved.targets[target]["bank"]
            if kind != type(layer.experts).__name__:
                raise CheckpointError(f"{file}: {target} has modules of kind {kind} there")
            for name, value in layer.experts.stacked_tensors().items():
                shape, own = content.get_slice(_tensor_name(target, name)).get_shape(), value.shape
                if shape[1:] != list(own[1:]):
                    raise CheckpointError(
                        f"{file}: {target} has {name} of {shape[1:]} there, "
                        f"and {list(own[1:])} in the run"
                    )
    counts = {int(target["modules"]) for target in saved.targets.values()}
    if len(counts) != 1:
        raise CheckpointError(f"{file}: its targets have different numbers of modules")
    return counts.pop()


def _copy_file(found: RestoredModel, file: Path, first: int) -> int:
    """Copy the file's modules into the run's from id `first` on; return their number."""
    count = 0
    with safe_open(file, framework="pt") as content, torch.no_grad():
        for target, layer in adapter_layers(found.model).items():
            for name, own in layer.experts.stacked_tensors().items():
                value = content.get_tensor(_tensor_name(target, name))
                own[first : first + len(value)] = value.to(own)
                count = len(value)
    return count


def _tensor_name(target: str, name: str) -> str:
    return f"{target}.{CHILD}.experts.{name}".removeprefix(".")


def _check_new_directory(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError("--to", to, "already exists and is not empty", "name a new directory")


def _write_run(found: RestoredModel, modular: ModularConfig, to: Path) -> None:
    config: Config = replace(
        found.config, modular=modular, train=replace(found.config.train, run_dir=None)
    )
    extra: dict[str, Any] = {
        "step": found.step,
        "config": asdict(config),
        "versions": {"dmoe": dmoe.__version__, "torch": torch.__version__},
    }

    def write() -> None:
        (to / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_load.save(
            to / "checkpoints", found.step, model_state(found.model, ParallelMesh()), extra
        )
        for name in ("config.yaml", "resolved.yaml"):
            (to / name).write_text(to_yaml(config), encoding="utf-8")

    _report_write_errors("--to", to, write)


def _report_write_errors(option: str, to: Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            option, to, f"cannot be written ({reason})", "name a directory with write permission"
        ) from None
