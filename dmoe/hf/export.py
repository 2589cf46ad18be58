"""Export of a run of a published model as a directory that transformers, vLLM and others load.

    checkpoint (one tensor in memory's layout at a time) -> conversions -> model-*-of-*.safetensors
    tensors of the source that the class does not know, tokenizer, generation config, chat template
    -> copied

Everything is written under another name, compared with the source (`compare.py`), and then renamed:
a directory of the given name is complete. Memory: the largest tensor and one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dmoe.checkpoint.manifest import read as read_manifest
from dmoe.checkpoint.tensor_reader import TensorReader
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.published import read_config, read_shape, source_directory
from dmoe.hf.compare import FLOATS, compare_directories
from dmoe.hf.disk_format import DiskFormat
from dmoe.hf.experts import FACTOR_A, FACTOR_B
from dmoe.hf.lora import delta
from dmoe.hf.model import build_empty
from dmoe.hf.published import (
    MAX_SHARD_BYTES,
    TORCH_DTYPES,
    PublishedDirectory,
    ShardWriter,
    finish_shards,
    tensors_of_parts,
)


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    path: str
    files: int
    tensors: int
    bytes: int
    copied: list[str]
    """Tensors that the model's class does not know, copied from the source."""
    notes: list[str]
    """Notes for the user, one sentence each."""


def export_checkpoint(
    checkpoint: Path, source: str | Path, out: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Exported:
    """Write the weights of a checkpoint in the format of the directory it was trained from.

    Low-rank factors are merged into them.

    Args:
        checkpoint: directory of one checkpoint.
        source: directory or hub name of the published model that the run was trained from.
        out: directory to create.
        max_shard_bytes: size of one file.

    Raises:
        CheckpointError: a damaged checkpoint, or one that does not fit the source; or the result
            is not what the source's files look like. Nothing is left at `out` then.
        ConfigError: `out` exists.
    """
    published = PublishedDirectory(source_directory(str(source)))
    model = build_empty(read_config(str(published.folder)), str(source))
    layout = DiskFormat(model, published)
    reader = TensorReader(checkpoint)
    check_source(reader.extra, str(source))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    prefix = prefix_of(reader, shapes)

    read = _merged_reader(reader, prefix, model)
    reserve(Path(out))
    with commit(Path(out)) as folder:
        writer = ShardWriter(folder, max_bytes=max_shard_bytes)
        known = set(layout.known.values())
        names = [name for name in shapes if name in known]
        for name, value in converted(layout, names, read):
            writer.add(name, value)
        for name in layout.unknown:
            writer.add(name, as_in_source(layout, name, published.read(name)))
        writer.flush()
        return finish(folder, Path(out), tensors_of_parts(folder), layout)


def converted(
    layout: DiskFormat, names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the files, in the dtype that they have in the source's files.

    Args:
        layout: the conversions.
        names: of the tensors in memory.
        read: returns one of them in full.

    Raises:
        CheckpointError: a tensor of the result is none of the source's.
    """
    for group in layout.groups(names):
        for name, value in layout.revert({member: read(member) for member in group}).items():
            yield name, as_in_source(layout, name, value)


def as_in_source(layout: DiskFormat, name: str, value: Tensor) -> Tensor:
    """Return a tensor of a file in the dtype of the source's; bfloat16 for a quantized source."""
    facts = layout.source.tensors.get(name)
    quantized = layout.source.quantized and (facts is None or facts.dtype not in FLOATS)
    if quantized and name in layout.known:
        return value.to(torch.bfloat16)
    if facts is None:
        raise CheckpointError(f"{layout.source.folder}: has no tensor {name!r} to export")
    if facts.dtype not in TORCH_DTYPES:
        why = f"is {facts.dtype} and unknown to the class, and cannot be copied beside bfloat16"
        raise CheckpointError(f"{layout.source.folder}: {name!r} {why}")
    return value.to(TORCH_DTYPES[facts.dtype])


def finish(folder: Path, out: Path, parts: Mapping[str, list[str]], layout: DiskFormat) -> Exported:
    """Name the files, copy what is no weight, and compare with the source.

    Raises:
        CheckpointError: a tensor is missing, or is not what the source's file has at its place.
    """
    source = layout.source
    written = {name for names in parts.values() for name in names}
    check_complete(out, written, layout)
    finish_shards(folder, parts)
    for path in source.other_files():
        target = folder / path.relative_to(source.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    notes = []
    if source.quantized:
        content = {k: v for k, v in source.config.items() if k != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        notes.append("the source is quantized; the export is bfloat16")
    if layout.unknown:
        notes.append(
            f"{len(layout.unknown)} tensors that the class does not know, such as"
            f" {layout.unknown[0]}, are copied from the source: they were not trained"
        )
    if not any(path.name.startswith("tokenizer") for path in source.other_files()):
        notes.append("the source has no tokenizer, so the export has none")
    found = compare_directories(PublishedDirectory(folder), source)
    if found.problems:
        raise CheckpointError(f"{out}: {found.problems[0]}")
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    return Exported(str(out), len(files), len(written), size, layout.unknown, notes)


def check_complete(out: Path, written: set[str], layout: DiskFormat) -> None:
    """Refuse an export with other tensors than the source, but for a quantized one's scales."""
    if new := sorted(written - {*layout.known, *layout.unknown}):
        raise CheckpointError(f"{out}: {new[0]!r} is new: the source has no such tensor")
    missing = sorted({*layout.known, *layout.unknown} - written)
    if missing:
        raise CheckpointError(f"{out}: {missing[0]!r} was not written ({len(missing)} are missing)")


def prefix_of(reader: TensorReader, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what stands before a model's name in the checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    first = next(iter(shapes))
    for name in reader.tensors:
        prefix = name.removesuffix(first)
        if not name.startswith("model.") or prefix == name:
            continue
        saved = {
            n.removeprefix(prefix): e for n, e in reader.tensors.items() if n.startswith(prefix)
        }
        wrong = [n for n, shape in shapes.items() if n not in saved or saved[n].shape != shape]
        if not wrong:
            return prefix
        raise CheckpointError(
            f"{reader.directory}: {wrong[0]!r} is missing or has another shape than the source's"
            " class; is it a run of this source?"
        )
    raise CheckpointError(f"{reader.directory}: has no {first!r}; is it a run of this source?")


@contextmanager
def commit(out: Path) -> Iterator[Path]:
    """Give the reserved directory, and rename it to `out`; after an error, remove it.

    Raises CheckpointError where a file cannot be written, as on a full disk.
    """
    folder = partial_name(out)
    try:
        yield folder
        if out.exists():
            out.rmdir()  # empty, by `reserve`
        folder.rename(out)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            why = f"writing {out} failed: {error}; nothing of it is left"
            raise CheckpointError(why) from error
        raise


def partial_name(out: Path) -> Path:
    """Return the name of an export until it is complete. Raises ConfigError for `.`."""
    if not out.name:
        raise ConfigError("--to", out, "is a directory that exists", "name a new directory")
    return out.with_name(f".{out.name}.partial")


def reserve(out: Path) -> None:
    """Create the directory that is renamed to `out` once it is complete.

    Raises:
        ConfigError: `out` has content, or its parent does not exist or cannot be written.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError("--to", out, "exists and is not empty", "name a new directory")
        if not out.parent.is_dir():
            raise ConfigError("--to", out, "its parent directory does not exist", "create it")
        folder = partial_name(out)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as error:
        why = f"cannot be created ({error.strerror})"
        raise ConfigError("--to", out, why, "choose a directory you may write to") from None


def _merged_reader(reader: TensorReader, prefix: str, model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads a weight and adds the product of its factors, if it has any."""
    scale = lora_scale(reader.extra)

    def read(name: str) -> Tensor:
        value = reader.read(prefix + name)
        module, _, weight = name.rpartition(".")
        ending = "" if weight == "weight" else f"_{weight}"
        factor_a, factor_b = (f"{prefix}{module}.{f}{ending}" for f in (FACTOR_A, FACTOR_B))
        if factor_a not in reader.tensors:
            return value
        assert scale is not None, "factors without model.lora in the config"
        a, b = reader.read(factor_a), reader.read(factor_b)
        is_transposed = ending != "" and bool(model.get_submodule(module).is_transposed)
        return value + delta(a, b, scale, is_transposed=is_transposed)

    return read


def lora_scale(extra: Mapping[str, Any]) -> float | None:
    """Return alpha / r of the run of a checkpoint; None without LoRA."""
    lora = model_section(extra).get("lora") or {}
    rank, alpha = lora.get("rank") or 0, lora.get("alpha")
    return (2 * rank if alpha is None else float(alpha)) / rank if rank else None


def model_section(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return section `model` of the config of a checkpoint's run; empty if it has none."""
    config = extra.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, dict) else {}


def check_source(extra: Mapping[str, Any], source: str) -> None:
    """Refuse a source whose config.json is not what the run of a checkpoint was trained with.

    Raises:
        CheckpointError: another number of layers, experts, experts per token, ...
    """
    config = extra.get("config") or {}
    for field, value in read_shape(source).fields.items() if config else ():
        section, _, name = field.partition(".")
        trained = config.get(section, {}).get(name, value)
        if trained != value:
            why = f"config.json says {field}={value}, and the run was trained with {trained}"
            raise CheckpointError(f"{source}: {why}; give its source with --source")


def source_of(checkpoint: Path) -> str | None:
    """Return the source that a run's checkpoint names in its config, or None.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    named = model_section(read_manifest(checkpoint).extra).get("source")
    return named if isinstance(named, str) else None
