"""What `dmoe modules` does to a run: say what is there, take modules out, put others in, write them into the weights.

In one process, which holds all experts and all modules. A new run directory has the weights alone, no optimizer: `dmoe generate` reads
it, `dmoe modules` does, and another run starts from it with `modular.core=DIR`.
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
from dmoe.modular import base_model_hash, export_peft, add_modules, inspect_modules, adapter_layers, merge, save_modules
from dmoe.modular.attach import CHILD
from dmoe.runs.directory import RunDir
from dmoe.train.restore import Restored, restore


@dataclass(frozen=True)
class TargetSummary:
    place: str
    bank: str
    router: str
    aggregation: str
    modules: int
    parameters: int
    """Of the bank."""


def list_modules(source: Path) -> list[TargetSummary]:
    """The modules of a run, or of a file of modules. Raises ConfigError for a run without any, CheckpointError for no such file."""
    if source.is_file():
        return [TargetSummary(name, **{**fields}) for name, fields in inspect_modules(source).targets.items()]  # type: ignore[arg-type]
    found = _restore_with_modules(RunDir(source))
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


def export_modules(run: RunDir, to: Path) -> str:
    """Write the modules alone into a file; the hash of the core they belong to."""
    found = _restore_with_modules(run)
    core = base_model_hash(found.model)
    _report_write_errors("--to", to, lambda: save_modules(found.model, to, base_model=core))
    return core


def export_module_to_peft(run: RunDir, module: int, folder: Path) -> None:
    """Write one low-rank module of every place in peft's format. Raises ConfigError for another bank, or no such module."""
    found = _restore_with_modules(run)
    _check_module(found.config.modular, module)
    _report_write_errors("--peft", folder, lambda: export_peft(found.model, module, folder))


def merge_run(run: RunDir, weights: Sequence[float], to: Path) -> None:
    """A run directory with the plain network into whose weights the modules are written.

    Raises: ConfigError where there is not one weight a module, or a place cannot be merged; then nothing is written.
    """
    found = _restore_with_modules(run)
    if len(weights) != found.config.modular.modules:
        allowed = f"must be one number for each of the {found.config.modular.modules} modules"
        raise ConfigError("--weights", ",".join(map(str, weights)), allowed, "e.g. 0.5,0.5 for two")
    _check_new_directory(to)
    merge(found.model, weights)
    _write_run(found, ModularConfig(), to)


def add_modules_to_run(run: RunDir, files: Sequence[Path], to: Path) -> int:
    """A run directory with the run's modules and, behind them, those of the files; how many there are now.

    Routers do not know the new ones yet: a learned one gets fresh rows, constant weights are 0, a table names them when it is changed.
    Raises: CheckpointError for a file of another core, or of modules that do not fit; then nothing is written.
    """
    found = _restore_with_modules(run)
    _check_new_directory(to)
    core, count = base_model_hash(found.model), 0
    for file in files:
        count += _check_file(found, file, core)
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


def _restore_with_modules(run: RunDir) -> Restored:
    found = restore(run)
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


def _check_file(found: Restored, file: Path, core: str) -> int:
    """How many modules the file holds, where they fit."""
    saved, here = inspect_modules(file), adapter_layers(found.model)
    if saved.base_model != core:
        raise CheckpointError(
            f"{file}: its modules belong to another core ({saved.base_model[:12]}, the run's is {core[:12]})"
        )
    if sorted(saved.targets) != sorted(here):
        raise CheckpointError(
            f"{file}: has modules at {', '.join(sorted(saved.targets))}, the run at {', '.join(sorted(here))}"
        )
    with safe_open(file, framework="pt") as content:
        for place, layer in here.items():
            if saved.targets[place]["bank"] != type(layer.experts).__name__:
                raise CheckpointError(
                    f"{file}: {place} has modules of kind {saved.targets[place]['bank']} there"
                )
            for name, stack in layer.experts.stacked_tensors().items():
                shape = content.get_slice(_tensor_name(place, name)).get_shape()
                if shape[1:] != list(stack.shape[1:]):
                    raise CheckpointError(
                        f"{file}: {place} has {name} of {shape[1:]} there, and {list(stack.shape[1:])} in the run"
                    )
    counts = {int(place["modules"]) for place in saved.targets.values()}
    if len(counts) != 1:
        raise CheckpointError(f"{file}: its places have different numbers of modules")
    return counts.pop()


def _copy_file(found: Restored, file: Path, first: int) -> int:
    """The file's modules become those from `first` on; how many they are."""
    count = 0
    with safe_open(file, framework="pt") as content, torch.no_grad():
        for place, layer in adapter_layers(found.model).items():
            for name, stack in layer.experts.stacked_tensors().items():
                value = content.get_tensor(_tensor_name(place, name))
                stack[first : first + len(value)] = value.to(stack)
                count = len(value)
    return count


def _tensor_name(place: str, stack: str) -> str:
    return f"{place}.{CHILD}.experts.{stack}".removeprefix(".")


def _check_new_directory(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError("--to", to, "is there already and not empty", "name a new directory")


def _write_run(found: Restored, modular: ModularConfig, to: Path) -> None:
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
            option, to, f"cannot be written ({reason})", "name a place you may write to"
        ) from None
