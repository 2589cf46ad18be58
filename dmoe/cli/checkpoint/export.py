"""Command `dmoe checkpoint export`, and `dmoe checkpoint verify DIR --against SOURCE`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import integer
from dmoe.config.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.hf.export import Exported

DTYPE_HELP = (
    "float32 (default), bfloat16 or float16, for dmoe's own transformer; a published model keeps "
    "the types of its source."
)
SIZE_HELP = "Size of a file in GiB at most; a larger tensor has a file of its own."


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_DIR", help="A run, or a checkpoint of a model.source.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Directory to create.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub name of the published model. Default: the run's model.source."
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option(help="Only the factors of model.lora, as a directory of peft.")
    ] = False,
    max_shard: Annotated[int, typer.Option(help=SIZE_HELP, **integer(1))] = 4,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Write a run's newest intact checkpoint in the format of the model it was trained from.

    A run of dmoe's own transformer becomes a Mixtral, Qwen3-MoE, Llama or Qwen3, if it is one.
    With model.lora, the factors are merged into the weights, or written alone by --adapter.

    The directory has the source's tokenizer, chat template and configs, and loads in transformers,
    vLLM and SGLang. It is compared with the source before it gets its name. Exit code 3 if the
    checkpoint is damaged or does not fit.

    Example: dmoe checkpoint export runs/latest --to my-mixtral
    """
    from dmoe.cli.checkpoint import info as checkpoint_info
    from dmoe.hf.export import export_checkpoint, source_of

    path = checkpoint_info.newest_intact(checkpoint_info.find_checkpoints(run))
    named = source or source_of(path)
    if named is None:
        if adapter:
            fix = "leave --adapter out"
            raise ConfigError("--adapter", True, "needs a run with model.lora", fix)
        result = _export_own(run, to, dtype or "float32", max_shard << 30)
        print(json.dumps(asdict(result), indent=2) if as_json else export_text(result))
        return
    if dtype is not None:
        why = "belongs to dmoe's own transformer; this run has the types of its source"
        raise ConfigError("--dtype", dtype, why, "leave it out")
    if adapter:
        from dmoe.hf.lora_peft import export_lora

        tensors = export_lora(path, named, to)
        print(
            json.dumps({"path": to, "tensors": tensors}) if as_json else f"{tensors} factors: {to}"
        )
        return
    result = export_checkpoint(path, named, to, max_shard << 30)
    print(json.dumps(asdict(result), indent=2) if as_json else export_text(result))


def _export_own(run: str, to: str, dtype: str, max_shard_bytes: int) -> Exported:
    """Export a run of dmoe's own transformer."""
    from dmoe.conversion.own_export import export_own
    from dmoe.runs.directory import find_run

    return export_own(find_run(run), to, dtype=dtype, max_shard_bytes=max_shard_bytes)


def export_text(result: Exported) -> str:
    """Describe an export in sentences."""
    from dmoe.report.format import format_bytes

    files = f"{result.files} file" + "s" * (result.files != 1)
    lines = [f"{result.tensors} tensors in {files}, {format_bytes(result.bytes)}: {result.path}"]
    return "\n".join([*lines, *result.notes])


def verify_against(folder: str, against: str, *, as_json: bool) -> None:
    """Compare a published directory with the one it was made from; exit code 3 if it is wrong."""
    from dmoe.hf.compare import compare_directories
    from dmoe.hf.published import PublishedDirectory

    for field, path in (("DIR", folder), ("--against", against)):
        if not (Path(path) / "config.json").is_file():
            fix = "give a directory of a published model"
            raise ConfigError(field, path, "has no config.json", fix)
    result = compare_directories(PublishedDirectory(folder), PublishedDirectory(against))
    if as_json:
        print(json.dumps({"ok": not result.problems, **asdict(result)}, indent=2))
    else:
        print("\n".join(result.problems) or _fine(result.changed, result.tensors))
    sys.exit(3 if result.problems else 0)


def _fine(changed: int, tensors: int) -> str:
    return (
        f"{tensors} tensors with the source's names, shapes and types, each at its place; "
        f"{changed} have other values"
    )
