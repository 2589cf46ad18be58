"""Import of a published model as a run of dmoe's own transformer, at step 0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dmoe.config.load import to_yaml
from dmoe.config.rules import check
from dmoe.config.schema import Config, ParallelConfig
from dmoe.conversion.new_run import first_extra, write_run
from dmoe.conversion.published_source import open_published
from dmoe.train.tasks import task_of


@dataclass(frozen=True)
class Imported:
    """Result of an import. The field names are the keys of `dmoe checkpoint import --json`."""

    path: str
    """The run directory."""
    source: str
    family: str
    parameters: int
    notes: list[str]
    """Notes for the user, one sentence each."""


def import_own(folder: str | Path, config: Config) -> Imported:
    """Create a run with the weights of a published directory, from which `dmoe train` continues.

    Args:
        folder: of a Mixtral, Qwen3-MoE, Llama, Mistral, SmolLM or Qwen3.
        config: the user's; what the directory decides is filled in.

    Raises:
        ConfigError: a model that dmoe's transformer is not, or a config that contradicts it.
        CheckpointError: a tensor is missing or left over.
    """
    source = open_published(folder)
    config = source.config(config)
    check(replace(config, parallel=ParallelConfig(virtual_ranks=config.parallel.virtual_ranks)), 1)
    model, notes = source.load(config)
    data = task_of(config).open_data()
    extra = first_extra(config, data, imported_from=str(source.files.folder.absolute()))
    path = write_run(config, to_yaml(config), model, extra)
    parameters = model.num_parameters().total
    return Imported(str(path), str(folder), source.model.family, parameters, notes)
