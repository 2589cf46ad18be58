"""Parallelism: expert-parallel size, batch sizes per rank, lower bounds of size and memory.

Sizes leave out the token embedding (it needs the tokenizer), norms, routers and activations: what
is computed here is a lower bound.

Letters: W world size, EP expert-parallel size, V virtual ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED, dense_kind, multiply_adds
from dmoe.config.plugins import parse
from dmoe.config.rules.model import head_dim, moe_blocks, moe_widths
from dmoe.config.schema import Config, MoEConfig, TrainConfig

MAX_WORLD = 1 << 20
"""Ten times the largest known job; the divisors of a larger number would take minutes to list."""
MAX_PARAMETERS = 10**15
MAX_TOKENS = 10**12
"""Tokens per step."""
TYPO = "is there a digit too many?"


@dataclass(frozen=True)
class Batching:
    """The parts of a global batch: `global_batch = W * V * micro_batch * accumulation`."""

    micro_batch: int
    """Sequences in a virtual rank's micro-batch."""
    accumulation: int
    """Micro-batches per virtual rank and optimizer step."""


def check_world(world: int) -> None:
    """Refuse a world size out of range.

    Raises:
        ConfigError: below 1 or above `MAX_WORLD`.
    """
    if not 1 <= world <= MAX_WORLD:
        allowed = f"must be a number of ranks from 1 to {MAX_WORLD}"
        raise ConfigError("world", world, allowed, "start fewer ranks")


def check_profile(train: TrainConfig, world: int) -> None:
    """Refuse a step or a rank to profile that there is not: no trace would be written.

    Raises:
        ConfigError: for the first such number.
    """
    limits = (("profile_steps", 1, train.steps), ("profile_ranks", 0, world - 1))
    for field, first, last in limits:
        for number in getattr(train, field):
            if not first <= number <= last:
                allowed = f"must be from {first} to {last}"
                raise ConfigError(f"train.{field}", number, allowed, "name one that there is")


def check_placement(config: Config) -> None:
    """Refuse to move or to copy experts that there are not, or that have no equal places.

    Raises:
        ConfigError: `kind=periodic` or `copies` with such experts; copies with padded slots.
    """
    placement = config.parallel.placement
    if placement.kind == "periodic":
        _check_movable(config, "parallel.placement.kind", "periodic", "moves", "use fixed")
    field, copies = "parallel.placement.copies", placement.copies
    if isinstance(copies, str) and copies != "auto":
        allowed = "must be auto or a number of slots per rank, from 0 up"
        raise ConfigError(field, copies, allowed, f"use {field}=auto")
    if copies == 0:
        return
    _check_movable(config, field, copies, "copies", "use 0")
    if config.moe.exchange == "padded":
        allowed = "saves nothing with moe.exchange=padded, where every rank computes equally many"
        raise ConfigError(field, copies, f"{allowed} slots, filled or not", "use packed")
    if parse(config.moe.experts.kind, "moe.experts.kind") is not None:
        allowed = f"needs dmoe's own experts, not {config.moe.experts.kind}"
        raise ConfigError(field, copies, allowed, "use 0")


def _check_movable(config: Config, field: str, value: object, verb: str, fix: str) -> None:
    if config.modular.bank != "none":
        allowed = f"{verb} the experts of MoE layers, not the modules of bank={config.modular.bank}"
        raise ConfigError(field, value, allowed, fix)
    if config.moe.experts.shapes:
        allowed = f"{verb} experts of one shape only: those of moe.experts.shapes differ in cost"
        raise ConfigError(field, value, allowed, fix)
    if config.model.source is None and not moe_widths(config):
        raise ConfigError(field, value, "needs a model with MoE layers", fix)


def can_share(config: Config, ep: int) -> bool:
    """Return whether `ep` ranks can share one copy of the experts, and of the modules.

    Uniform experts and modules must divide evenly; of experts of different shapes each rank needs
    at least one (`dmoe/moe/placement.py` assigns them).
    """
    return _can_share_experts(config, ep) and _can_share_modules(config, ep)


def shares_something(config: Config) -> bool:
    """Return whether there is anything that expert-parallel ranks could share."""
    return bool(moe_widths(config)) or config.modular.bank != "none"


def _can_share_experts(config: Config, ep: int) -> bool:
    experts = config.moe.num_experts
    if not moe_widths(config) and config.modular.bank != "none":
        return True
    return ep <= experts if config.moe.experts.shapes else experts % ep == 0


def _can_share_modules(config: Config, ep: int) -> bool:
    """parameter_mean sums the parameters of all modules, so each rank needs all of them."""
    modular = config.modular
    if modular.bank == "none" or ep == 1:
        return True
    return modular.modules % ep == 0 and modular.aggregation != "parameter_mean"


def expert_parallel(config: Config, world: int) -> int:
    """Return the expert-parallel size.

    For `auto`, the largest one that divides the world and by which the experts can be shared.

    Raises:
        ConfigError: a size that does not fit the world, the experts or the modules.
    """
    ep, experts = config.parallel.ep, config.moe.num_experts
    modules = config.modular.modules if config.modular.bank != "none" else 1
    # With more ranks than experts and modules some would have none.
    most = min(world, max(experts, modules))
    fits = [n for n in range(1, most + 1) if world % n == 0 and can_share(config, n)]
    if ep == "auto":
        return max(fits) if shares_something(config) else 1
    if not isinstance(ep, int) or ep < 1:
        allowed = "must be auto or a number of ranks from 1 up"
        raise ConfigError("parallel.ep", ep, allowed, "use parallel.ep=auto")
    if world % ep:
        if world == 1:
            allowed = f"needs {ep} ranks or a multiple of them, and this is one process"
            fix = f"start {ep} with --ranks {ep}, launch/local.sh or torchrun, or use parallel.ep=1"
            raise ConfigError("parallel.ep", ep, allowed, fix)
        allowed = f"must divide the world of {world} ranks"
        raise ConfigError("parallel.ep", ep, allowed, f"use one of {fits}")
    if _can_share_experts(config, ep) and not _can_share_modules(config, ep):
        raise _unshared_modules(config, ep, fits)
    if not can_share(config, ep):
        allowed = f"must be divisible by parallel.ep={ep}"
        if config.moe.experts.shapes:
            allowed = f"leaves some of the parallel.ep={ep} ranks without an expert"
        raise ConfigError("moe.num_experts", experts, allowed, f"use parallel.ep from {fits}")
    return ep


def _unshared_modules(config: Config, ep: int, fits: list[int]) -> ConfigError:
    modular = config.modular
    if modular.aggregation == "parameter_mean":
        allowed = f"needs all modules on every rank, and parallel.ep={ep} divides them"
        fix = "use parallel.ep=1, or weighted_sum"
        return ConfigError("modular.aggregation", "parameter_mean", allowed, fix)
    allowed = f"must be divisible by parallel.ep={ep}"
    return ConfigError("modular.modules", modular.modules, allowed, f"use parallel.ep from {fits}")


def batching(config: Config, world: int) -> Batching:
    """Return micro-batch and accumulation; the global batch never depends on the world size.

    Raises:
        ConfigError: a batch that does not divide evenly.
    """
    ranks = world * config.parallel.virtual_ranks
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % ranks:
        allowed = f"must be a multiple of the {ranks} (virtual) ranks that share it"
        nearest = max(1, round(batch / ranks)) * ranks
        raise ConfigError("train.global_batch", batch, allowed, f"use {nearest}")
    share = batch // ranks
    micro = share if micro is None else micro
    if share % micro:
        allowed = f"must divide the {share} sequences of one (virtual) rank"
        divisor = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError("train.micro_batch", micro, allowed, f"use {divisor}")
    return Batching(micro, share // micro)


@dataclass(frozen=True)
class Size:
    """Numbers of parameters."""

    dense: int
    """Those that every rank has under DDP."""
    experts: int
    """Those of the routed experts, over all ranks."""

    def largest(self, config: Config) -> tuple[str, int]:
        """Return the field on which most of the parameters depend, and its value."""
        if self.experts > self.dense:
            return "moe.num_experts", config.moe.num_experts
        return "model.dim", config.model.dim


def check_size(config: Config) -> None:
    """Refuse more parameters, or tokens per step, than any cluster can hold.

    Raises:
        ConfigError: the number that is too large.
    """
    size = model_size(config)
    total = size.dense + size.experts
    if total > MAX_PARAMETERS:
        allowed = f"gives {total:.0e} parameters, more than any cluster can hold"
        raise ConfigError(*size.largest(config), allowed, TYPO)
    batch, seq_len = config.train.global_batch, config.data.seq_len
    tokens = batch * (1 if config.train.task == "classification" else seq_len)
    if tokens > MAX_TOKENS:
        allowed = f"times data.seq_len={seq_len} gives {tokens:.0e} tokens per step"
        raise ConfigError("train.global_batch", batch, allowed, TYPO)


def model_size(config: Config) -> Size:
    """Count the parameters, without what this module leaves out."""
    model, moe = config.model, config.moe
    if model.source is not None:  # its files, at most 4 bytes each
        files = Path(model.source).expanduser().glob("*.safetensors")
        return Size(0, sum(file.stat().st_size for file in files) // 4)
    num_moe = len(moe_blocks(config))
    matrices = 3 if dense_kind(moe.experts) in GATED else 2
    heads = 2 * (model.heads + (model.kv_heads or model.heads))
    attention = model.dim * head_dim(model) * heads
    if config.train.task == "classification":
        attention = 0
    shared = moe.experts.shared * (moe.experts.shared_dim or moe.expert_dim)
    active = moe.top_k * moe.expert_dim + shared
    widths = (model.layers - num_moe) * (model.dense_dim or active) + num_moe * shared
    layers = Counter(moe_widths(config))
    return Size(
        model.layers * attention + matrices * model.dim * widths,
        sum(count * _expert_parameters(moe, *width) for width, count in layers.items()),
    )


def _expert_parameters(moe: MoEConfig, dim: int, out_dim: int) -> int:
    """Count the parameters of the routed experts of one layer."""
    kind = moe.experts.kind
    if not moe.experts.shapes:
        return moe.num_experts * multiply_adds([moe.expert_dim], dim, out_dim, kind)
    return sum(multiply_adds(shape, dim, out_dim, kind) for shape in moe.experts.shapes)
