"""Save a moefied model from N ranks, each rank its own experts: `dmoe.hf.save_pretrained`.

Where the files hold one tensor per expert, no rank ever has another's experts: it converts its own
stack, and the ids in the names are shifted to the global ones. Stacked families (gpt-oss, Granite)
have one tensor for all experts, which is gathered, one at a time. The first rank writes the rest.

Letters: E experts, e local experts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dmoe.checkpoint.consensus import RankGroup
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.published import source_directory
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.full_tensors import gather_full
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.parallel_model import ParallelModel
from dmoe.hf.adapters import EXPERT_ID
from dmoe.hf.disk_format import DiskFormat
from dmoe.hf.export import Exported, as_in_source, commit, finish, partial_name, reserve
from dmoe.hf.lora import is_lora
from dmoe.hf.published import MAX_SHARD_BYTES, PublishedDirectory, ShardWriter, tensors_of_parts


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    source: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported | None:
    """Save a moefied model as `save_pretrained` of transformers would; collective.

    The result has the tokenizer and configs of the source, is compared with it, and only then gets
    its name. Memory of a rank: its largest tensor and one file.

    Args:
        model: a moefied model of transformers, in `dmoe.parallelize` or on one process.
        folder: directory to create, that all ranks see.
        source: directory or hub name that it was loaded from; default: what the model says.
        max_shard_bytes: size of one file.

    Returns:
        What was written, on the first rank; None on the others.

    Raises:
        CheckpointError: on every rank, if anything fails on any; `folder` is not created then.
        ConfigError: the model names no source, or has LoRA.
    """
    mesh = model.mesh if isinstance(model, ParallelModel) else ParallelMesh()
    inner = cast(Any, model.module if isinstance(model, ParallelModel) else model)
    if any(map(is_lora, inner.state_dict(keep_vars=True))):
        why = "has LoRA, which a published model's files cannot hold"
        fix = "call dmoe.hf.save_lora(model, DIR), or dmoe.hf.merge_lora(model) first"
        raise ConfigError("model", type(inner).__name__, why, fix)
    named = source or getattr(inner.config, "_name_or_path", "")
    if not named:
        why = "does not say from which directory it was loaded"
        raise ConfigError("source", named or None, why, "give source=DIR")
    ranks, out = RankGroup(mesh.checkpoint_group), Path(folder)
    partial = partial_name(out)
    with ranks.all_or_none("save_pretrained"):
        layout = DiskFormat(inner, PublishedDirectory(source_directory(named)))
        if mesh.rank == 0:
            reserve(out)
    writer = ShardWriter(partial, f"{mesh.rank}-", max_shard_bytes)
    try:
        with ranks.all_or_none("save_pretrained"):
            # a rank that cannot write goes on with the collectives, and fails at the end
            _RankSaver(inner, layout, mesh, writer).run()
    except CheckpointError:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    done = None
    with ranks.all_or_none("save_pretrained"):
        if mesh.rank == 0:
            with commit(out):
                done = finish(partial, out, tensors_of_parts(partial), layout)
    return done


class _RankSaver:
    """One rank's part of a save."""

    def __init__(
        self, model: nn.Module, layout: DiskFormat, mesh: ParallelMesh, writer: ShardWriter
    ) -> None:
        self.layout, self.mesh, self.writer = layout, mesh, writer
        self.state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.stacks = set(expert_parameters(model))
        self.error: Exception | None = None

    def run(self) -> None:
        """Convert and write everything; raises the first error once all collectives are done."""
        known = set(self.layout.known.values())
        for group in self.layout.groups(name for name in self.state if name in known):
            self._save(group)
        if self.mesh.rank == 0:
            for name in self.layout.unknown:
                self._write({name: self.layout.source.read(name)})
        self._write({}, flush=True)
        if self.error is not None:
            raise self.error

    def _save(self, group: list[str]) -> None:
        """Save the tensors that one conversion needs."""
        stacked = self.stacks.intersection(group)
        assert not stacked or len(stacked) == len(group), f"{group} mixes experts and others"
        whole: dict[str, Tensor] = {}
        if stacked and self._one_tensor_per_expert(group):
            # over the replicas of the same experts only, where FSDP2 shards them
            for name in group:
                whole |= gather_full({name: self.state[name]}, set(), self.mesh)
            if self.mesh.edp_rank == 0:
                first = self.mesh.ep_rank * len(whole[group[0]])
                reverted = self.layout.revert(whole)
                self._write({_shifted(name, first): v for name, v in reverted.items()})
            return
        for name in group:
            whole |= gather_full({name: self.state[name]}, self.stacks, self.mesh)
        if self.mesh.rank == 0:
            self._write(self.layout.revert(whole))

    def _one_tensor_per_expert(self, group: list[str]) -> bool:
        shapes = {name: self.state[name].detach().to("meta") for name in group}
        return all(EXPERT_ID.search(name) for name in self.layout.revert(shapes))

    def _write(self, tensors: Mapping[str, Tensor], flush: bool = False) -> None:
        if self.error is not None:
            return
        try:
            for name, value in tensors.items():
                self.writer.add(name, as_in_source(self.layout, name, value.detach().cpu()))
            if flush:
                self.writer.flush()
        except (OSError, CheckpointError) as error:
            self.error = error


def _shifted(name: str, first: int) -> str:
    """Return a name with the global id of an expert that is the n-th of this rank."""
    return EXPERT_ID.sub(lambda found: str(int(found[0]) + first), name)
