"""Who shares what: EP from the world, and how a global batch is cut.

Letters: W world size, EP expert-parallel degree, V virtual ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED, multiply_adds
from dmoe.config.rules.model import head_dim, moe_blocks, moe_widths
from dmoe.config.schema import Config, MoEConfig

LARGEST_WORLD = 1 << 20
"""Ten times the largest job anyone has run; beyond it the number is a slip, and what divides it would take minutes to list."""


@dataclass(frozen=True)
class Batching:
    """How a global batch is cut: `global_batch = W * V * micro_batch * accumulation`."""

    micro_batch: int
    """Sequences of one virtual rank's micro-batch."""
    accumulation: int
    """Micro-batches a virtual rank takes one after the other in an optimizer step."""


def check_world(world: int) -> None:
    if not 1 <= world <= LARGEST_WORLD:
        raise ConfigError(
            "world",
            world,
            f"must be a number of ranks from 1 to {LARGEST_WORLD}",
            "start fewer ranks",
        )


def can_share(config: Config, ep: int) -> bool:
    """Whether so many ranks can share one copy of the experts: uniform ones in equal numbers, those of different shape at least one
    each (which rank has which: moe/ownership.py). And the modules, in equal numbers."""
    return _share_experts(config, ep) and _share_modules(config, ep)


def shares_something(config: Config) -> bool:
    """Whether there is anything that EP ranks could divide: experts or modules."""
    return bool(moe_widths(config)) or config.modular.bank != "none"


def _share_experts(config: Config, ep: int) -> bool:
    experts = config.moe.num_experts
    if not moe_widths(config) and config.modular.bank != "none":
        return True
    return ep <= experts if config.moe.experts.shapes else experts % ep == 0


def _share_modules(config: Config, ep: int) -> bool:
    """parameter_mean adds up the parameters of all modules, so each rank needs all of them."""
    modular = config.modular
    return (
        modular.bank == "none"
        or ep == 1
        or (modular.modules % ep == 0 and modular.aggregation != "parameter_mean")
    )


def expert_parallel(config: Config, world: int) -> int:
    """EP: the number given, or for `auto` the largest one that divides the world and that the experts can be shared by."""
    ep, experts = config.parallel.ep, config.moe.num_experts
    fits = [
        n
        for n in range(1, min(world, _most(config)) + 1)
        if world % n == 0 and can_share(config, n)
    ]
    if ep == "auto":
        return max(fits) if shares_something(config) else 1
    if not isinstance(ep, int) or ep < 1:
        raise ConfigError(
            "parallel.ep", ep, "must be auto or a number of ranks from 1 up", "use parallel.ep=auto"
        )
    if world % ep:
        raise ConfigError(
            "parallel.ep", ep, f"must divide the world of {world} ranks", f"use one of {fits}"
        )
    if _share_experts(config, ep) and not _share_modules(config, ep):
        _refuse_modules(config, ep, fits)
    if config.moe.experts.shapes and ep > experts:
        allowed = f"leaves some of the parallel.ep={ep} ranks without an expert"
        raise ConfigError("moe.num_experts", experts, allowed, f"use parallel.ep from {fits}")
    if not can_share(config, ep):
        raise ConfigError(
            "moe.num_experts",
            experts,
            f"must be divisible by parallel.ep={ep}",
            f"use parallel.ep from {fits}",
        )
    return ep


def _most(config: Config) -> int:
    """No more ranks than this can have something each: what divides a larger world need not be listed."""
    return max(
        config.moe.num_experts, config.modular.modules if config.modular.bank != "none" else 1
    )


def _refuse_modules(config: Config, ep: int, fits: list[int]) -> None:
    if config.modular.aggregation == "parameter_mean":
        allowed = f"needs all modules on every rank, and parallel.ep={ep} divides them"
        raise ConfigError(
            "modular.aggregation", "parameter_mean", allowed, "use parallel.ep=1, or weighted_sum"
        )
    allowed = f"must be divisible by parallel.ep={ep}"
    raise ConfigError(
        "modular.modules", config.modular.modules, allowed, f"use parallel.ep from {fits}"
    )


def batching(config: Config, world: int) -> Batching:
    """Micro-batch and accumulation from the global batch; the global batch never depends on the world."""
    ranks = world * config.parallel.virtual_ranks
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % ranks:
        nearest = max(1, round(batch / ranks)) * ranks
        raise ConfigError(
            "train.global_batch",
            batch,
            f"must be a multiple of the {ranks} (virtual) ranks that share it",
            f"use {nearest}",
        )
    share = batch // ranks
    micro = share if micro is None else micro
    if share % micro:
        fits = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError(
            "train.micro_batch",
            micro,
            f"must divide the {share} sequences of one (virtual) rank",
            f"use {fits}",
        )
    return Batching(micro, share // micro)


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
