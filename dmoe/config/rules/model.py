"""The network: widths that divide, and where it has mixtures of experts.

How large a model is at the least, and whether this machine could hold it: before torch is asked to, and the kernel ends the process.

Letters: D model width, F expert hidden width, E experts, A width of a head. The token embedding is left out (it needs the
tokenizer), and so are norms, routers and activations: what is computed here is a lower bound.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dmoe.config.datasets import chosen_streams, columns_of
from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED, multiply_adds
from dmoe.config.rules.parallel import expert_parallel
from dmoe.config.schema import Config, MoEConfig


def moe_blocks(config: Config) -> list[int]:
    """Indices of the blocks whose feed-forward is a mixture of experts."""
    model = config.model
    if model.moe_every == 0 or (config.train.task == "classification" and model.fusion == "gated"):
        return []
    return [
        i
        for i in range(model.dense_first, model.layers)
        if (i - model.dense_first + 1) % model.moe_every == 0
    ]


def moe_widths(config: Config) -> list[tuple[int, int]]:
    """Width in and width out of every mixture layer of the network, first to last: in blocks, and a classifier's others."""
    model = config.model
    blocks = [(model.dim, model.dim)] * len(moe_blocks(config))
    if config.train.task != "classification":
        return blocks
    encoders = [(model.dim, model.dim)] if model.fusion == "gated" else []
    if model.head != "experts":
        return encoders + blocks
    width = model.dim if model.layers else sum(chosen_streams(config.data).values())
    return [*encoders, *blocks, (width, len(columns_of(config.data).classes))]


def head_dim(config: Config) -> int:
    return config.model.head_dim or config.model.dim // config.model.heads


def check_model(config: Config) -> None:
    model = config.model
    if model.dense_first > model.layers:
        raise ConfigError(
            "model.dense_first",
            model.dense_first,
            f"must be at most model.layers={model.layers}",
            "lower it",
        )
    if config.train.task == "classification":  # no attention
        return
    if model.layers < 1:
        raise ConfigError("model.layers", model.layers, "must be 1 or more", "use 1")
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError(
            "model.dim",
            model.dim,
            f"must be divisible by model.heads={model.heads}",
            "or set model.head_dim",
        )
    if head_dim(config) % 2:
        raise ConfigError(
            "model.head_dim",
            head_dim(config),
            "must be even for rotary positions",
            "use an even width per head",
        )
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise ConfigError(
            "model.kv_heads",
            model.kv_heads,
            f"must divide model.heads={model.heads}",
            f"use {model.heads}",
        )


MOST_PARAMETERS = 10**15
MOST_TOKENS = 10**12
BYTES = 16
"""Of a parameter in training: weight, gradient and AdamW's two moments, in float32 each."""


@dataclass(frozen=True)
class Size:
    """Parameters that every rank has under DDP, and those of the routed experts of all ranks."""

    dense: int
    experts: int

    def largest(self, config: Config) -> tuple[str, int]:
        """The field to name: most of the parameters depend on it."""
        if self.experts > self.dense:
            return "moe.num_experts", config.moe.num_experts
        return "model.dim", config.model.dim


def check_size(config: Config) -> None:
    """Refuse what no machine can hold."""
    size = _size(config)
    if size.dense + size.experts > MOST_PARAMETERS:
        allowed = (
            f"gives {size.dense + size.experts:.0e} parameters, more than any cluster can hold"
        )
        raise ConfigError(*size.largest(config), allowed, "is there a digit too many?")
    tokens = config.train.global_batch * (
        1 if config.train.task == "classification" else config.data.seq_len
    )
    if tokens > MOST_TOKENS:
        allowed = f"times data.seq_len={config.data.seq_len} gives {tokens:.0e} tokens a step"
        raise ConfigError(
            "train.global_batch", config.train.global_batch, allowed, "is there a digit too many?"
        )


def check_memory(config: Config, world: int, local: int, memory: int) -> None:
    """Refuse a model whose training state is larger than a machine that trains `local` of `world` ranks in its main memory.

    memory: bytes of this machine.
    """
    size = _size(config)
    dense = size.dense // (world if config.parallel.mode == "fsdp" else 1)
    experts = size.experts // (
        world if config.parallel.mode == "fsdp" else expert_parallel(config, world)
    )
    needed = BYTES * local * (dense + experts)
    if needed > memory:
        allowed = (
            f"gives {size.dense + size.experts:,} parameters, whose training takes at least {needed / 2**30:,.0f} GiB "
            f"on this machine of {memory / 2**30:,.0f} GiB"
        )
        raise ConfigError(
            *size.largest(config), allowed, "make the model smaller, or train it on more machines"
        )


def _size(config: Config) -> Size:
    model, moe = config.model, config.moe
    mixtures = len(moe_blocks(config))
    matrices = 3 if moe.experts.kind in GATED else 2
    attention = model.dim * head_dim(config) * 2 * (model.heads + (model.kv_heads or model.heads))
    if config.train.task == "classification":
        attention = 0
    shared = moe.experts.shared * (moe.experts.shared_dim or moe.expert_dim)
    active = moe.top_k * moe.expert_dim + shared
    widths = (model.layers - mixtures) * (model.dense_dim or active) + mixtures * shared
    dense = model.layers * attention + matrices * model.dim * widths
    return Size(
        dense,
        sum(layers * _experts(moe, *one) for one, layers in Counter(moe_widths(config)).items()),
    )


def _experts(moe: MoEConfig, dim: int, out_dim: int) -> int:
    """Parameters of the routed experts of one layer."""
    if not moe.experts.shapes:
        return moe.num_experts * multiply_adds([moe.expert_dim], dim, out_dim, moe.experts.kind)
    return sum(multiply_adds(shape, dim, out_dim, moe.experts.kind) for shape in moe.experts.shapes)
