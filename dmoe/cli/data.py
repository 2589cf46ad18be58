"""Commands `dmoe data prepare` and `dmoe data inspect`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import integer, number
from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.rules import check
from dmoe.config.schema import Config, DataConfig

if TYPE_CHECKING:
    from dmoe.data.prepare.inspect import DataInfo

app = typer.Typer(
    no_args_is_help=True,
    help="Prepare text once as shards, in constant memory; look at shards, tokens and text.",
)
MAX_WORKERS = 256
TextField = Annotated[
    str | None,
    typer.Option("--text-field", help="Field or column of records that is the text."),
]
LabelField = Annotated[
    str | None,
    typer.Option("--label-field", help="Field or column of records that is the domain."),
]
Vocab = Annotated[
    int | None,
    typer.Option("--tokenizer-vocab", help="Entries kept of a tiktoken vocabulary.", **integer(1)),
]


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Files, globs or directories of text or records, or FILE.bin of tokens "
            "(nanoGPT, Megatron); see docs/data.md.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Directory of the shards, to be made.")
    ],
    tokenizer: Annotated[
        str,
        typer.Option(metavar="T", help="bytes, a tokenizers .json file or a tiktoken rank file."),
    ] = "bytes",
    tokenizer_vocab: Vocab = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that encode. Default: the CPUs of this process.",
            **integer(1, MAX_WORKERS),
        ),
    ] = None,
    holdout: Annotated[
        float, typer.Option(help="Share of the documents that is held out.", **number())
    ] = DataConfig.holdout,
    text_field: TextField = None,
    label_field: LabelField = None,
    validation_source: Annotated[
        str | None,
        typer.Option("--validation-source", help="Entries that are the held-out split."),
    ] = None,
) -> None:
    """Encode text once, so that every start and every rank only maps the tokens.

    Memory is constant: under 1 GB for any corpus. Exact duplicates are left out. A preparation that
    was interrupted, even by kill -9, goes on with the same command. Training then reads DIR with
    data.source=DIR and the same tokenizer.

    Example: dmoe data prepare 'books/*.jsonl' --tokenizer bytes --out shards
    """
    config = _checked(
        DataConfig(
            source=source,
            tokenizer=tokenizer,
            tokenizer_vocab=tokenizer_vocab,
            holdout=holdout,
            text_field=text_field,
            label_field=label_field,
            validation_source=validation_source,
        )
    )
    from dmoe.cli.data_progress import progress_display
    from dmoe.data.prepare import prepare_shards

    processes = workers or len(os.sched_getaffinity(0))
    with progress_display(source, processes) as display:
        index = prepare_shards(config, out, workers=processes, on_progress=display.update)
    tokens = [sum(s.tokens for s in split.shards) for split in index.splits.values()]
    print("; ".join([display.summary(), *index.notes]))
    chosen = "" if tokenizer == "bytes" else f" data.tokenizer={tokenizer}"
    chosen += f" data.tokenizer_vocab={tokenizer_vocab}" if tokenizer_vocab else ""
    print(f"{out}: {tokens[0]:,} training and {tokens[1]:,} held-out tokens")
    print(f"train with: dmoe train data.source={out}{chosen}")


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="DIR_OR_FILE", help="A directory of shards, FILE.bin of tokens, or text."
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="T", help="To decode samples of other tokens than bytes."),
    ] = None,
    tokenizer_vocab: Vocab = None,
    text_field: TextField = None,
    label_field: LabelField = None,
    samples: Annotated[
        int, typer.Option(help="Documents that are shown per split.", **integer(0, 1000))
    ] = 2,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all shards, and compare their SHA-256.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show what data hold: documents, lengths, domains, tokenizer, and the beginning of some.

    Of shards, nothing else is read, unless --verify. Of text, every document is.

    Example: dmoe data inspect shards --verify
    """
    from dmoe.data.prepare.inspect import inspect_data
    from dmoe.data.shard_index import is_shard_directory
    from dmoe.data.shards import verify_shards
    from dmoe.data.tokenizers import open_tokenizer

    config = DataConfig(source=source, text_field=text_field, label_field=label_field)
    if tokenizer is not None:
        config = replace(config, tokenizer=tokenizer, tokenizer_vocab=tokenizer_vocab)
    config = _checked(config)
    info = inspect_data(config, open_tokenizer(config) if tokenizer else None, samples)
    if verify:
        if not is_shard_directory(source):
            reason = "has no SHA-256 of its content"
            raise ConfigError("--verify", source, reason, "name a directory of shards")
        verify_shards(Path(source).expanduser())
        info.about["verified"] = "every byte has the SHA-256 of the index"
    print(json.dumps(asdict(info), indent=2) if as_json else "\n".join(_lines(info)))


def _checked(data: DataConfig) -> DataConfig:
    config: Config = replace(Config(), data=data)
    check(config)
    return load_plugins(config).data  # type: ignore[no-any-return]


def _lines(info: DataInfo) -> list[str]:
    lines = [f"{info.path}: {info.kind}"]
    lines += [f"  {name}: {value}" for name, value in info.about.items()]
    lines += [f"  note: {note}" for note in info.notes]
    for name, split in info.splits.items():
        count = "an unknown number of" if split.documents is None else f"{split.documents:,}"
        text = "" if split.text_bytes is None else f" of {split.text_bytes / 1e6:,.1f} MB of text"
        size = f"{split.size:,} {info.unit}" if info.unit == "tokens" else f"{split.size:,} bytes"
        lines.append(f"{name}: {count} documents, {size}{text if info.unit == 'tokens' else ''}")
        if split.lengths:
            lines.append(f"  {info.unit} per document: {_spread_of(split.lengths)}")
        if len(split.domains) > 1:
            lines += [
                f"  {domain}: {documents:,} documents, {size:,} {info.unit}"
                for domain, (documents, size) in split.domains.items()
            ]
        lines += [f"  {sample.place}: {_escaped(sample.text)}" for sample in split.samples]
    return lines


def _spread_of(lengths: Sequence[int]) -> str:
    names = ("least", "10%", "median", "90%", "most")
    return ", ".join(f"{name} {n:,}" for name, n in zip(names, lengths, strict=True))


def _escaped(text: str) -> str:
    """Return text on one line, without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
