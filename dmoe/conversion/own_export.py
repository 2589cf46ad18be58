"""Export of a run of dmoe's own transformer as Mixtral, Qwen3-MoE, Llama or Qwen3.

Everything is written under another name and then renamed: a directory of the given name is
complete. Memory: the model, and one file.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.load import load as load_config
from dmoe.conversion.own_config import family_of, published_config
from dmoe.conversion.own_names import pieces
from dmoe.conversion.tokenizer_files import write_tokenizer
from dmoe.data import open_tokenizer
from dmoe.hf.export import Exported, commit, reserve
from dmoe.hf.published import MAX_SHARD_BYTES, ShardWriter, finish_shards, tensors_of_parts
from dmoe.models.transformer import Transformer
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_own(
    run: RunDir,
    out: str | Path,
    step: int | None = None,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the model of a run as a directory that transformers loads.

    Args:
        run: of dmoe's own transformer.
        out: directory to create.
        step: of the checkpoint; None: the newest that is intact.
        dtype: of the files: float32, bfloat16 or float16.
        max_shard_bytes: size of one file.

    Raises:
        ConfigError: a setting that no published family has, or `out` exists.
        CheckpointError: there is no intact checkpoint, or it is not of dmoe's own transformer.
    """
    config = load_config(run.path / "resolved.yaml")
    family = family_of(config)
    if dtype not in DTYPES:
        allowed = f"must be {', '.join(DTYPES)}"
        raise ConfigError("--dtype", dtype, allowed, "use float32")
    restored = restore_model(run, step)
    if not isinstance(restored.model, Transformer):
        raise CheckpointError(f"{run.path} holds a model of your own, which has no family")
    tokenizer = open_tokenizer(config.data)
    values = dict(restored.model.named_parameters())
    target = Path(out)
    reserve(target)
    with commit(target) as folder:
        writer = ShardWriter(folder, max_bytes=max_shard_bytes)
        for piece in pieces(restored.model, family):
            value = piece.view(values[piece.parameter].detach())
            writer.add(piece.name, value.to("cpu", DTYPES[dtype]).contiguous())
        writer.flush()
        parts = tensors_of_parts(folder)
        finish_shards(folder, parts)
        content = published_config(config, tokenizer.vocab_size, tokenizer.separator, dtype)
        write_json(folder / "config.json", content)
        end = {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
        write_json(folder / "generation_config.json", end)
        notes = [f"it is a {content['architectures'][0]}", *write_tokenizer(folder, config.data)]
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Exported(str(target), len(parts), sum(map(len, parts.values())), size, [], notes)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
