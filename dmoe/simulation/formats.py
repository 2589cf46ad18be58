"""Traces in published layouts, both ways: FLAME-MoE's and Megatron-LM's token-imbalance benchmark.

FLAME-MoE (`CMU-FLAME/FLAME-MoE-Traces`, 2025), one file per MoE layer, one row per token, in the
order of the data; pyarrow reads and writes it:

    DIR/layer_02.parquet ...    indices list<int16>[K], scores list<float16>[K], descending

It has no sequences: data.seq_len and train.global_batch of the config cut the rows into samples and
steps, and the first train.steps of them are read. Scores lose their last 13 bits.

Megatron-LM (pull request 7488, trace-v1, 2026), one directory per step and layer, alone or in one
above them:

    manifest.json               sizes, step_id, logical_layer_id, SHA-256 of each tensor file
    tensors/expert_ids.pt       int64 [T, K]; token_ids.pt: the same; gates.pt: float32 [T, K]
    tensors/source_rank.pt      int32 [T]: the rank that a token comes from

A source rank becomes a sample; shorter ones are filled up with tokens that choose nothing. Their
`.pt` files are zip archives; the numbers are taken from the stored bytes, nothing is unpickled.

Letters: T tokens, S positions per sample, K experts per token, E experts.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.expert_shapes import count_choices
from dmoe.config.schema import Config
from dmoe.replay.part import NONE, ChoiceSpec, Part, part_header
from dmoe.simulation.trace import FIELD, Trace, open_trace

MEGATRON = {"expert_ids": "int64", "gates": "float32", "source_rank": "int32"}
"""Tensors of Megatron's layout that are read, and their types."""


def open_any(path: Path, config: Config, any_batch: bool = False) -> Trace:
    """Open a trace in any of the layouts; with `any_batch`, of any `train.global_batch`.

    Raises:
        ConfigError: there is none, or it is of another model than the config's.
        CheckpointError: it is damaged.
    """
    if path.is_dir():
        layers = sorted(path.glob("layer_*.parquet"))
        if layers:
            return _open_flame(path, layers, config)
        manifests = sorted([*path.glob("manifest.json"), *path.glob("*/manifest.json")])
        if manifests:
            return _open_megatron(path, manifests, config)
    return open_trace(path, config, any_batch)


def export_trace(trace: Trace, target: str, config: Config) -> Path:
    """Write a trace of choices with scores as `flame:DIR` or `megatron:DIR`; return DIR.

    Raises:
        ConfigError: another format, a directory that has files, or choices that it cannot hold.
    """
    name, _, folder = target.partition(":")
    if name not in ("flame", "megatron") or not folder:
        allowed = "must be flame:DIR or megatron:DIR"
        raise ConfigError("--export", target, allowed, "name format and directory")
    path = Path(folder).expanduser()
    if path.exists() and any(path.iterdir()):
        raise ConfigError("--export", target, "is not empty", "name a new directory")
    if not (trace.has_choices and trace.has_scores):
        allowed = "holds choices with scores, and this trace has counts"
        raise ConfigError("--export", target, allowed, "record with tracking.trace=choices")
    if name == "flame" and any((trace.choices(step) == NONE).any() for step in trace.steps):
        allowed = "holds K experts for every token, and some chose fewer"
        raise ConfigError("--export", target, allowed, "use megatron:DIR")
    path.mkdir(parents=True, exist_ok=True)
    (_export_flame if name == "flame" else _export_megatron)(trace, path, config)
    return path


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        fix = "pip install pyarrow"
        raise ConfigError(FIELD, "parquet", "needs pyarrow", fix) from None
    return pyarrow


def _open_flame(path: Path, files: list[Path], config: Config) -> Trace:
    pyarrow, seq_len, batch = _pyarrow(), config.data.seq_len, config.train.global_batch
    wanted, top_k = config.train.steps * batch * seq_len, config.moe.top_k
    experts, scores = [], []
    for file in files:
        try:
            table = _first_rows(pyarrow, file, wanted)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} cannot be read as a trace ({error})") from None
        arrays = [
            np.asarray(table.column(name).combine_chunks().flatten()).reshape(len(table), -1)
            for name in ("indices", "scores")
        ]
        experts.append(arrays[0].astype(np.int32))
        scores.append(arrays[1].astype(np.float32))
    shapes = {array.shape for array in (*experts, *scores)}
    if len(shapes) > 1 or experts[0].shape[1] != top_k:
        allowed = f"has {sorted(shapes)} tokens and experts per token, and moe.top_k is {top_k}"
        raise ConfigError(FIELD, path, allowed, "use the config of its model")
    steps = len(experts[0]) // (batch * seq_len)
    if steps == 0:
        allowed = f"holds {len(experts[0])} tokens, less than a step of {batch} x {seq_len}"
        raise ConfigError(FIELD, path, allowed, "lower train.global_batch or data.seq_len")
    spec = _spec("FLAME-MoE", batch, seq_len, len(files), config)
    rows = slice(0, steps * spec.tokens_per_step)
    return _made(path, np.stack(experts, 1)[rows], np.stack(scores, 1)[rows], spec)


def _first_rows(pyarrow: Any, file: Path, wanted: int) -> Any:
    """Read no more of a file of 50 million tokens than is wanted."""
    batches, rows = [], 0
    read = pyarrow.parquet.ParquetFile(file).iter_batches(1 << 16, columns=["indices", "scores"])
    while rows < wanted and (batch := next(read, None)) is not None:
        batches.append(batch)
        rows += len(batch)
    return pyarrow.Table.from_batches(batches).slice(0, wanted)


def _open_megatron(path: Path, manifests: list[Path], config: Config) -> Trace:
    cells: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
    world = 0
    for file in manifests:
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            key = int(manifest["step_id"]), int(manifest["logical_layer_id"])
            world = int(manifest["world_size"])
            found = int(manifest["num_experts"]), int(manifest["topk"])
            tensors = {name: manifest["tensors"][name] for name in MEGATRON}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is no manifest of a trace ({error!r})") from None
        wanted = count_choices(config.moe), config.moe.top_k
        if found != wanted:
            allowed = f"has {found[0]} experts, {found[1]} per token, and the config {wanted}"
            raise ConfigError(FIELD, file.parent, allowed, "set moe.num_experts and moe.top_k")
        cells[key] = tuple(_read_pt(file.parent, name, tensors[name]) for name in MEGATRON)
    steps, layers = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    if len(cells) != len(steps) * len(layers):
        allowed = f"has {len(cells)} traces, not one for each of {len(steps)} steps and "
        raise ConfigError(FIELD, path, f"{allowed}{len(layers)} layers", "give all of them")
    longest = max(int(np.bincount(cell[2], minlength=world).max()) for cell in cells.values())
    spec = _spec("Megatron-LM", world, longest, len(layers), config)
    shape = (len(steps) * world * longest, len(layers), spec.top_k)
    expert_NLK, score_NLK = np.full(shape, NONE, np.int32), np.zeros(shape, np.float32)
    for s, step in enumerate(steps):
        for column, layer in enumerate(layers):
            ids_TK, gate_TK, source_T = cells[step, layer]
            for source in range(world):
                mine = source_T == source
                first = (s * world + source) * longest
                rows = slice(first, first + int(mine.sum()))
                expert_NLK[rows, column], score_NLK[rows, column] = ids_TK[mine], gate_TK[mine]
    return _made(path, expert_NLK, score_NLK, spec)


def _spec(data: str, batch: int, seq_len: int, layers: int, config: Config) -> ChoiceSpec:
    return ChoiceSpec(data, 0, batch, seq_len, layers, count_choices(config.moe), config.moe.top_k)


def _made(path: Path, expert_NLK: np.ndarray, score_NLK: np.ndarray, spec: ChoiceSpec) -> Trace:
    """Return imported choices as a trace. Raises ConfigError for ids that are no experts."""
    if expert_NLK.min() < NONE or expert_NLK.max() >= spec.experts:
        allowed = f"names expert {int(expert_NLK.max())}, and there are {spec.experts}"
        raise ConfigError(FIELD, path, allowed, "set moe.num_experts")
    header = part_header(spec, 0, len(expert_NLK) // spec.tokens_per_step, "")
    return Trace(path, [Part(path, expert_NLK, header, score_NLK)], spec)


def _read_pt(folder: Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """Read a tensor that torch.save wrote from its bytes, after its SHA-256."""
    file = folder / str(entry.get("file"))
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its bytes do not have the recorded SHA-256")
        if entry["dtype"] != MEGATRON[name]:
            raise ValueError(f"{entry['dtype']} in place of {MEGATRON[name]}")
        with zipfile.ZipFile(file) as archive:
            stored = next(entry for entry in archive.namelist() if entry.endswith("/data/0"))
            numbers = np.frombuffer(archive.read(stored), MEGATRON[name])
        return numbers.reshape(entry["shape"])
    except (OSError, ValueError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} cannot be read as a tensor ({error!r})") from None


def _export_flame(trace: Trace, path: Path, config: Config) -> None:
    pyarrow = _pyarrow()
    expert_NLK = np.concatenate([trace.choices(step) for step in trace.steps])
    score_NLK = np.concatenate([trace.scores(step) for step in trace.steps])
    top_k = trace.spec.top_k
    for layer in range(trace.spec.layers):
        columns = {
            "scores": score_NLK[:, layer].astype(np.float16),
            "indices": expert_NLK[:, layer].astype(np.int16),
        }
        made = {
            name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.ravel()), top_k)
            for name, array in columns.items()
        }
        pyarrow.parquet.write_table(pyarrow.table(made), path / f"layer_{layer:02d}.parquet")


def _export_megatron(trace: Trace, path: Path, config: Config) -> None:
    spec = trace.spec
    for step in trace.steps:
        expert_NLK, score_NLK = trace.choices(step), trace.scores(step)
        for layer in range(spec.layers):
            chosen_N = (expert_NLK[:, layer] != NONE).all(1)
            source_N = np.arange(len(expert_NLK)) // spec.seq_len
            gate_TK = score_NLK[chosen_N, layer]
            tensors = {
                "token_ids": expert_NLK[chosen_N, layer],
                "gates": gate_TK / gate_TK.sum(1, keepdims=True),
                "source_rank": source_N[chosen_N].astype(np.int32),
                "expert_ids": expert_NLK[chosen_N, layer],
            }
            folder = path / f"step_{step:06d}_layer_{layer:02d}"
            (folder / "tensors").mkdir(parents=True)
            manifest: dict[str, Any] = {
                "schema_version": 1,
                "producer_commit": "dmoe",
                "seed": spec.seed,
                "logical_layer_id": layer,
                "step_id": step,
                "microbatch_id": 0,
                "logical_num_tokens": int(chosen_N.sum()),
                "num_experts": spec.experts,
                "topk": spec.top_k,
                "hidden_size": config.model.dim,
                "world_size": spec.global_batch,
                "original_partition": "rank-major, contiguous per source rank",
                "workload_id": config.moe.router.workload,
                "workload_checksum": hashlib.sha256(str(asdict(spec)).encode()).hexdigest(),
                "tensors": {},
            }
            for name, array in tensors.items():
                file = folder / "tensors" / f"{name}.pt"
                torch.save(torch.from_numpy(np.ascontiguousarray(array)), file)
                manifest["tensors"][name] = {
                    "file": f"tensors/{name}.pt",
                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                }
            text = json.dumps(manifest, indent=2)
            (folder / "manifest.json").write_text(text, encoding="utf-8")
