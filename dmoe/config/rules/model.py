"""The network and its task: widths that divide, MoE layers and their positions, classification."""

from __future__ import annotations

from dmoe.config.datasets import DATASETS, check_table_fields, selected_streams, table_spec
from dmoe.config.errors import ConfigError
from dmoe.config.plugins import parse
from dmoe.config.router_kinds import kinds_where, router_spec
from dmoe.config.rules.layer import check_layer, check_widths
from dmoe.config.schema import Config, ModelConfig

ROUTED_BY = {
    "label_T": "a label of the sample, which is the answer",
    "token_id_T": "the ids of tokens",
}
"""Inputs of routers without a gate that a sample of a table cannot give."""


def moe_blocks(config: Config) -> list[int]:
    """List the indices of the blocks whose feed-forward is a MoE layer."""
    model = config.model
    if config.train.task == "classification" and model.fusion == "gated":
        return []
    return [index for index in range(model.layers) if is_moe_block(model, index)]


def is_moe_block(model: ModelConfig, index: int) -> bool:
    """Return whether a block is sparse: every `moe_every`-th one after the first `dense_first`."""
    if model.moe_every <= 0 or index < model.dense_first:
        return False
    return (index - model.dense_first + 1) % model.moe_every == 0


def moe_widths(config: Config) -> list[tuple[int, int]]:
    """List input and output width of every MoE layer: encoders, blocks, head of a classifier."""
    model = config.model
    blocks = [(model.dim, model.dim)] * len(moe_blocks(config))
    if config.train.task != "classification":
        return blocks
    encoders = [(model.dim, model.dim)] if model.fusion == "gated" else []
    if model.head != "experts":
        return encoders + blocks
    width = model.dim if model.layers else sum(selected_streams(config.data).values())
    return [*encoders, *blocks, (width, len(table_spec(config.data).classes))]


def head_dim(model: ModelConfig) -> int:
    """Return the width of one attention head."""
    return model.head_dim or model.dim // model.heads


def check_optim(config: Config) -> None:
    """Refuse parameter groups with settings of their own that mean nothing.

    Raises:
        ConfigError: the first reason found.
    """
    for field, used in {
        "modular.bank": config.modular.bank != "none",
        "moe.experts.shapes": bool(config.moe.experts.shapes),
    }.items():
        if config.optim.moments == "bf16" and used:
            raise ConfigError("optim.moments", "bf16", f"does not work with {field}", "use fp32")
    if config.optim.offload and config.optim.moments == "bf16":
        why = "is for moments in fp32: those in bf16 are rounded on the GPU"
        raise ConfigError("optim.offload", True, why, "use optim.moments=fp32, or leave it out")
    for pattern, own in config.optim.groups.items():
        for name, value in own.items():
            shown = f"{pattern}: {name}={value:g}"
            if name not in ("lr", "weight_decay"):
                allowed = f"has {name}; a group has lr and weight_decay of its own"
                raise ConfigError("optim.groups", shown, allowed, "use one of them")
            if value < 0:
                fix = "lr: 0 trains nothing" if name == "lr" else "use 0"
                raise ConfigError("optim.groups", shown, "must not be negative", fix)


def check_model(config: Config) -> None:
    """Refuse widths and numbers of blocks that do not fit.

    Raises:
        ConfigError: the first reason found.
    """
    model, experts = config.model, config.moe.experts
    if config.train.recompute == "activation" and (experts.shapes or parse(experts.kind)):
        why = "is for experts of one shape and of dmoe's own kinds"
        raise ConfigError("train.recompute", "activation", why, "use experts or block")
    if model.dense_first > model.layers:
        allowed = f"must be at most model.layers={model.layers}"
        raise ConfigError("model.dense_first", model.dense_first, allowed, "lower it")
    if config.train.task == "classification":  # it has no attention
        return
    if model.layers < 1:
        raise ConfigError("model.layers", model.layers, "must be 1 or more", "use 1")
    check_attention(model)


def check_attention(model: ModelConfig) -> None:
    """Refuse numbers of heads that do not divide, and heads that rotary positions cannot pair.

    Raises:
        ConfigError: the first reason found.
    """
    if model.head_dim is None and model.dim % model.heads:
        allowed = f"must be divisible by model.heads={model.heads}"
        raise ConfigError("model.dim", model.dim, allowed, "or set model.head_dim")
    if (width := head_dim(model)) % 2:
        allowed = "must be even for rotary positions"
        raise ConfigError("model.head_dim", width, allowed, "use an even width per head")
    if model.kv_heads is not None and model.heads % model.kv_heads:
        allowed = f"must divide model.heads={model.heads}"
        raise ConfigError("model.kv_heads", model.kv_heads, allowed, f"use {model.heads}")


def check_task(config: Config) -> None:
    """Refuse a source that the task cannot read; for classification, streams that do not fit.

    Comes before every rule that needs the shape of the network.

    Raises:
        ConfigError: the first reason found.
    """
    if config.train.task == "classification":
        _check_classification(config)
    elif config.data.source in DATASETS or config.data.source.startswith("sklearn:"):
        allowed, fix = "is a table of labelled samples and no text", "set train.task=classification"
        raise ConfigError("data.source", config.data.source, allowed, fix)


def _check_classification(config: Config) -> None:
    check_table_fields(config.data)
    streams, model = selected_streams(config.data), config.model
    if model.stream_dropout and len(streams) < 2:
        names = ", ".join(streams)
        allowed = f"needs two streams, and {names} is one: a sample never loses its last"
        fix = "set it to 0, or name more in data.streams"
        raise ConfigError("model.stream_dropout", model.stream_dropout, allowed, fix)
    if model.fusion == "gated":
        _check_gated_fusion(config, list(streams))
    else:
        _check_classifier_routers(config)


def _check_gated_fusion(config: Config, streams: list[str]) -> None:
    """Each stream's encoder is one expert, chosen by the stream's index as a label."""
    moe, head = config.moe, config.model.head
    if len(streams) < 2:
        allowed = f"joins two streams or more, and {streams[0]} is one"
        fix = "use concat, or name more in data.streams"
        raise ConfigError("model.fusion", "gated", allowed, fix)
    if head != "linear":
        allowed = "must be linear for model.fusion=gated, whose router is fixed by the stream"
        raise ConfigError("model.head", head, allowed, "use linear")
    why = "for model.fusion=gated, where the encoder of a stream is its expert"
    if router_spec(moe.router.kind).needs != "label_T":
        kinds = " or ".join(kinds_where(needs="label_T"))
        allowed = f"must be {kinds} {why}"
        raise ConfigError("moe.router.kind", moe.router.kind, allowed, f"use {kinds}")
    if moe.top_k != 1:
        raise ConfigError("moe.top_k", moe.top_k, f"must be 1 {why}", "use 1")
    if moe.num_experts != len(streams):
        allowed = f"must be the number of data.streams, {len(streams)}, {why}"
        raise ConfigError("moe.num_experts", moe.num_experts, allowed, f"use {len(streams)}")


def _check_classifier_routers(config: Config) -> None:
    moe, widths = config.moe, moe_widths(config)
    needs = router_spec(moe.router.kind).needs
    if widths and needs in ROUTED_BY:
        allowed = (
            f"routes by {ROUTED_BY[needs]}; samples have no such thing to go by with "
            "model.fusion=concat"
        )
        fix = "use top_k, or another router that reads its input"
        raise ConfigError("moe.router.kind", moe.router.kind, allowed, fix)
    changed = next(((i, o) for i, o in widths if i != o), None)
    if moe.experts.copy and changed:
        allowed = f"cannot return an input of width {changed[0]} as logits of width {changed[1]}"
        raise ConfigError("moe.experts.copy", moe.experts.copy, allowed, "use 0")


def check_moe(config: Config) -> None:
    """Refuse settings of the MoE layers that do not fit together.

    Raises:
        ConfigError: the first reason found.
    """
    check_layer(config.moe)
    _check_causal(config)
    widths = moe_widths(config)
    if not widths:
        return
    model = config.model
    has_dense = len(moe_blocks(config)) < model.layers
    if config.moe.experts.shapes and has_dense and model.dense_dim is None:
        allowed = "has no default beside moe.experts.shapes: no one width is active in a MoE layer"
        raise ConfigError("model.dense_dim", None, allowed, "give the width of the dense blocks")
    for dim, out_dim in set(widths):
        check_widths(config.moe, dim, out_dim)


def _check_causal(config: Config) -> None:
    """Refuse what a router must not do in a causal language model."""
    router = config.moe.router
    spec = router_spec(router.kind)
    if config.train.task != "language_modelling" or router.allow_future_leak:
        return
    if spec.looks_ahead:
        allowed = (
            "looks at later tokens of a sequence to choose among earlier ones, which a causal "
            "model must not"
        )
        fix = "use top_k, or accept it with moe.router.allow_future_leak=true"
        raise ConfigError("moe.router.kind", router.kind, allowed, fix)
    if router.per == "sequence":
        allowed = (
            "routes a token by the mean over its whole sequence, later tokens included, which a "
            "causal model must not"
        )
        fix = "use token, or accept it with moe.router.allow_future_leak=true"
        raise ConfigError("moe.router.per", "sequence", allowed, fix)
