"""`train.task=classification`: streams, fusion and head that fit together; and what only one of the tasks reads."""

from __future__ import annotations

from dmoe.config.datasets import CATALOGUE, chosen_streams
from dmoe.config.errors import ConfigError
from dmoe.config.rules.model import moe_widths
from dmoe.config.schema import Config

READ_BY = {
    "classification": ("model.fusion", "model.head", "model.stream_dropout", "data.streams"),
    "language_modelling": (
        *(
            "data.tokenizer",
            "data.tokenizer_vocab",
            "data.temperature",
            "data.eval_source",
            "train.sample_prompt",
        ),
        *(
            "model.kv_heads",
            "model.head_dim",
            "model.qk_norm",
            "model.tie_embeddings",
            "model.rope_base",
        ),
    ),
}
"""Fields that one task alone reads."""


def check_task(config: Config) -> None:
    """Before everything that asks for the shape of the network."""
    for task, names in READ_BY.items():
        if task != config.train.task:
            _unread(config, names, task)
    if config.train.task == "classification":
        _classification(config)
    elif config.data.source in CATALOGUE or config.data.source.startswith("sklearn:"):
        allowed = "is a table of labelled samples and no text"
        raise ConfigError(
            "data.source", config.data.source, allowed, "set train.task=classification"
        )


def _unread(config: Config, names: tuple[str, ...], task: str) -> None:
    default = Config()
    for name in names:
        section, field = name.split(".")
        value = getattr(getattr(config, section), field)
        if value != getattr(getattr(default, section), field):
            allowed = f"has no meaning for train.task={config.train.task}, only for {task}"
            raise ConfigError(name, value, allowed, "leave it out")


def _classification(config: Config) -> None:
    streams, model = chosen_streams(config.data), config.model
    if not 0 <= model.stream_dropout <= 1:
        raise ConfigError(
            "model.stream_dropout", model.stream_dropout, "must be between 0 and 1", "use 0.3"
        )
    if model.stream_dropout and len(streams) < 2:
        allowed = (
            f"needs two streams, and {', '.join(streams)} is one: a sample never loses its last"
        )
        raise ConfigError(
            "model.stream_dropout",
            model.stream_dropout,
            allowed,
            "set it to 0, or name more in data.streams",
        )
    if model.fusion == "gated":
        _gated(config, list(streams))
    else:
        _mixtures(config)


def _gated(config: Config, streams: list[str]) -> None:
    moe = config.moe
    if len(streams) < 2:
        allowed = f"joins two streams or more, and {streams[0]} is one"
        raise ConfigError(
            "model.fusion", "gated", allowed, "use concat, or name more in data.streams"
        )
    if config.model.head != "linear":
        allowed = (
            "must be linear for model.fusion=gated, whose one kind of router is fixed by the stream"
        )
        raise ConfigError("model.head", config.model.head, allowed, "use linear")
    why = "for model.fusion=gated, where the encoder of a stream is its expert"
    if moe.router.kind != "fixed":
        raise ConfigError("moe.router.kind", moe.router.kind, f"must be fixed {why}", "use fixed")
    if moe.top_k != 1:
        raise ConfigError("moe.top_k", moe.top_k, f"must be 1 {why}", "use 1")
    if moe.num_experts != len(streams):
        allowed = f"must be the number of data.streams, {len(streams)}, {why}"
        raise ConfigError("moe.num_experts", moe.num_experts, allowed, f"use {len(streams)}")


def _mixtures(config: Config) -> None:
    moe = config.moe
    if moe_widths(config) and moe.router.kind in ("fixed", "hash"):
        reads = (
            "a label of the sample, which is the answer"
            if moe.router.kind == "fixed"
            else "the ids of tokens"
        )
        allowed = f"routes by {reads}; samples have no such thing to go by with model.fusion=concat"
        raise ConfigError(
            "moe.router.kind",
            moe.router.kind,
            allowed,
            "use top_k, or another router that reads its input",
        )
    changed = next(((i, o) for i, o in moe_widths(config) if i != o), None)
    if moe.experts.copy and changed:
        allowed = f"cannot return an input of width {changed[0]} as logits of width {changed[1]}"
        raise ConfigError("moe.experts.copy", moe.experts.copy, allowed, "use 0")
