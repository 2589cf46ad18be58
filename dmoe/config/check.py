"""Values that do not fit together, refused before torch starts. Each rule names the field, what is allowed, and the fix.

Letters: W world size, EP expert-parallel degree, V virtual ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config, RouterConfig

__all__ = ["Batching", "batching", "check", "check_router", "expert_parallel", "head_dim", "moe_blocks"]

AT_LEAST_ONE = (
    "model.dim model.layers model.heads moe.num_experts moe.top_k moe.expert_dim moe.capacity.min_capacity parallel.virtual_ranks "
    "data.seq_len train.steps train.global_batch train.log_every train.eval_sequences checkpoint.keep"
)
NOT_NEGATIVE = (
    "model.moe_every model.dense_first moe.experts.shared moe.balance.switch moe.balance.z moe.balance.importance "
    "moe.balance.load moe.balance.usage_std moe.balance.bias train.eval_every train.sample_tokens "
    "optim.warmup optim.weight_decay checkpoint.every train.seed optim.min_lr_ratio optim.decay_fraction"
)
POSITIVE = (
    "optim.lr optim.eps model.rope_base model.norm_eps model.init_std moe.router.scale parallel.timeout parallel.start_timeout"
)
OPTIONAL_POSITIVE = (
    "model.kv_heads model.head_dim model.dense_dim moe.capacity.factor moe.capacity.eval_factor moe.experts.shared_dim "
    "train.micro_batch optim.clip data.tokenizer_vocab"
)
WITHOUT_ORDER = ("fixed", "hash", "soft", "expert_choice")
"""Routers that do not rank a token's experts by score: they have no next choice, and nothing that a bias could move."""
READ_BY = {
    "score": ("top_k", "group_limited"),
    "weights_from": ("top_k", "group_limited", "adaptive"),
    "jitter": ("top_k", "noisy", "group_limited", "adaptive", "soft", "expert_choice"),
    "groups": ("group_limited",),
    "topk_groups": ("group_limited",),
    "top_p": ("adaptive",),
    "k_min": ("adaptive",),
    "allow_future_leak": ("expert_choice",),
}
"""Fields that only some kinds read. Not renormalize: who comes from top_k=1 has it at false, which is harmless everywhere."""
AT_MOST_ONE = "optim.min_lr_ratio optim.decay_fraction optim.beta1 optim.beta2"


@dataclass(frozen=True)
class Batching:
    """How a global batch is cut: `global_batch = W * V * micro_batch * accumulation`."""

    micro_batch: int
    """Sequences of one virtual rank's micro-batch."""
    accumulation: int
    """Micro-batches a virtual rank takes one after the other in an optimizer step."""


def check(config: Config, world: int = 1) -> None:
    """Refuse what cannot work on `world` ranks. Raises ConfigError with the first reason found."""
    _ranges(config)
    _model(config)
    _moe(config)
    _capacity(config)
    _balance(config)
    expert_parallel(config, world)
    batching(config, world)
    _rest(config)


def expert_parallel(config: Config, world: int) -> int:
    """EP: the number given, or for `auto` the largest one that divides both the world and the number of experts."""
    ep, experts = config.parallel.ep, config.moe.num_experts
    if ep == "auto":
        return math.gcd(world, experts) if moe_blocks(config) else 1
    if not isinstance(ep, int) or ep < 1:
        raise ConfigError("parallel.ep", ep, "must be auto or a number of ranks from 1 up", "use parallel.ep=auto")
    fits = [n for n in range(1, world + 1) if world % n == 0 and experts % n == 0]
    if world % ep:
        raise ConfigError("parallel.ep", ep, f"must divide the world of {world} ranks", f"use one of {fits}")
    if experts % ep:
        raise ConfigError("moe.num_experts", experts, f"must be divisible by parallel.ep={ep}", f"use parallel.ep from {fits}")
    return ep


def batching(config: Config, world: int) -> Batching:
    """Micro-batch and accumulation from the global batch; the global batch never depends on the world."""
    ranks = world * config.parallel.virtual_ranks
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % ranks:
        nearest = max(1, round(batch / ranks)) * ranks
        raise ConfigError(
            "train.global_batch", batch, f"must be a multiple of the {ranks} (virtual) ranks that share it", f"use {nearest}"
        )
    share = batch // ranks
    micro = share if micro is None else micro
    if share % micro:
        fits = max(n for n in range(1, min(micro, share) + 1) if share % n == 0)
        raise ConfigError("train.micro_batch", micro, f"must divide the {share} sequences of one (virtual) rank", f"use {fits}")
    return Batching(micro, share // micro)


def moe_blocks(config: Config) -> list[int]:
    """Indices of the blocks whose feed-forward is a mixture of experts."""
    model = config.model
    if model.moe_every == 0:
        return []
    return [i for i in range(model.dense_first, model.layers) if (i - model.dense_first + 1) % model.moe_every == 0]


def head_dim(config: Config) -> int:
    return config.model.head_dim or config.model.dim // config.model.heads


def _model(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.dim % model.heads:
        raise ConfigError("model.dim", model.dim, f"must be divisible by model.heads={model.heads}", "or set model.head_dim")
    if head_dim(config) % 2:
        raise ConfigError("model.head_dim", head_dim(config), "must be even for rotary positions", "use an even width per head")
    if model.kv_heads is not None and model.heads % model.kv_heads:
        raise ConfigError("model.kv_heads", model.kv_heads, f"must divide model.heads={model.heads}", f"use {model.heads}")
    if model.dense_first > model.layers:
        raise ConfigError("model.dense_first", model.dense_first, f"must be at most model.layers={model.layers}", "lower it")


def _moe(config: Config) -> None:
    moe = config.moe
    if moe.top_k > moe.num_experts:
        raise ConfigError(
            "moe.top_k", moe.top_k, f"must be at most moe.num_experts={moe.num_experts}", f"use {moe.num_experts} or less"
        )
    check_router(moe.router, moe.num_experts, moe.top_k)
    _router_in_model(config)
    if moe.exchange == "padded" and moe.capacity.factor is None:
        raise ConfigError(
            "moe.exchange", "padded", "sends a fixed number of slots and so needs moe.capacity.factor", "set it, e.g. to 1.25"
        )


def check_router(router: RouterConfig, num_experts: int, top_k: int) -> None:
    """Refuse settings of a router that mean nothing, whatever the layer around it. Raises ConfigError."""
    for field, kinds in READ_BY.items():
        if getattr(router, field) != getattr(RouterConfig(), field) and router.kind not in kinds:
            allowed = f"has no meaning for moe.router.kind={router.kind}, only for {', '.join(kinds)}"
            raise ConfigError(f"moe.router.{field}", getattr(router, field), allowed, f"leave moe.router.{field} out")
    if not 0 <= router.jitter < 1:
        raise ConfigError("moe.router.jitter", router.jitter, "must be at least 0 and less than 1", "Switch used 0.01")
    _starved(router, top_k)
    if router.kind == "group_limited":
        _groups(router, num_experts, top_k)
    elif router.kind == "adaptive":
        _adaptive(router, top_k)
    elif router.kind == "soft" and top_k != num_experts:
        allowed = f"must be moe.num_experts={num_experts} for moe.router.kind=soft, which sends a token to every expert"
        raise ConfigError("moe.top_k", top_k, allowed, f"use {num_experts}")


def _starved(router: RouterConfig, top_k: int) -> None:
    """A weight that is 1 whatever the logits are sends the router no gradient."""
    if router.kind == "noisy" and top_k == 1:
        allowed = "with moe.router.kind=noisy makes every weight 1 and starves the router of gradient"
        raise ConfigError("moe.top_k", 1, allowed, "use 2 or more, or moe.router.kind=top_k with moe.router.jitter")
    if router.kind not in ("top_k", "group_limited") or top_k > 1:
        return
    allowed = "with moe.top_k=1 makes every weight 1 and starves the router of gradient"
    if router.renormalize:
        raise ConfigError("moe.router.renormalize", True, allowed, "set it to false")
    if router.weights_from == "chosen" and router.score == "softmax":
        raise ConfigError("moe.router.weights_from", "chosen", allowed, "use all")


def _groups(router: RouterConfig, num_experts: int, top_k: int) -> None:
    if router.groups < 1 or num_experts % router.groups:
        fits = f"use one of {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}"
        raise ConfigError("moe.router.groups", router.groups, f"must divide moe.num_experts={num_experts}", fits)
    if not 1 <= router.topk_groups <= router.groups:
        allowed = f"must be between 1 and moe.router.groups={router.groups}"
        raise ConfigError("moe.router.topk_groups", router.topk_groups, allowed, f"use {router.groups} or less")
    eligible = router.topk_groups * num_experts // router.groups
    if top_k > eligible:
        allowed = f"must be at most the {eligible} experts of moe.router.topk_groups={router.topk_groups} groups"
        raise ConfigError("moe.top_k", top_k, allowed, f"use {eligible} or less, or more topk_groups")


def _adaptive(router: RouterConfig, top_k: int) -> None:
    if not 0 < router.top_p <= 1:
        raise ConfigError("moe.router.top_p", router.top_p, "must be greater than 0 and at most 1", "use 0.6")
    if not 1 <= router.k_min <= top_k:
        raise ConfigError("moe.router.k_min", router.k_min, f"must be from 1 to moe.top_k={top_k}", f"use {top_k} or less")
    allowed = "with moe.router.k_min=1 gives a token of one expert weight 1, from which its router learns nothing"
    for field, chosen, fix in (("renormalize", True, "false"), ("weights_from", "chosen", "all")):
        if router.k_min == 1 and getattr(router, field) == chosen:
            raise ConfigError(f"moe.router.{field}", chosen, allowed, f"set it to {fix}, or moe.router.k_min=2")


def _router_in_model(config: Config) -> None:
    """What a router cannot do inside a causal language model or together with a capacity."""
    router, limits = config.moe.router, config.moe.capacity
    if router.kind == "expert_choice":
        if not router.allow_future_leak:
            allowed = "looks at later tokens of a sequence to choose among earlier ones, which a causal model must not"
            fix = "use top_k, or accept it with moe.router.allow_future_leak=true"
            raise ConfigError("moe.router.kind", router.kind, allowed, fix)
        if limits.group == "global":
            raise ConfigError("moe.capacity.group", "global", "expert_choice cannot compare tokens of all ranks", "use rank")
    for field in ("factor", "eval_factor"):
        factor = getattr(limits, field)
        if router.kind == "soft" and factor is not None and factor < 1:
            allowed = "must be at least 1 for moe.router.kind=soft: every token needs a slot with every expert"
            raise ConfigError(f"moe.capacity.{field}", factor, allowed, "use 1.0 or leave it out")


def _capacity(config: Config) -> None:
    moe, capacity = config.moe, config.moe.capacity
    field, fewest = ("router.k_min", moe.router.k_min) if moe.router.kind == "adaptive" else ("top_k", moe.top_k)
    if capacity.renormalize and fewest == 1 and moe.router.kind not in WITHOUT_ORDER:
        allowed = f"with moe.{field}=1 makes the weight of an expert that is alone 1 and starves the router of gradient"
        raise ConfigError("moe.capacity.renormalize", True, allowed, "set it to false")
    if capacity.overflow != "next_choice":
        return
    if capacity.factor is None and capacity.eval_factor is None:
        raise ConfigError(
            "moe.capacity.overflow", "next_choice", "needs a capacity that overflows", "set moe.capacity.factor, e.g. to 1.25"
        )
    if moe.router.kind in WITHOUT_ORDER:
        raise ConfigError(
            "moe.capacity.overflow", "next_choice", f"needs a next expert, which router {moe.router.kind} has not", "use drop"
        )
    if moe.top_k == moe.num_experts and moe.router.kind != "adaptive":
        raise ConfigError(
            "moe.capacity.overflow", "next_choice", "needs a next expert, but moe.top_k chooses all of them", "use drop"
        )


def _balance(config: Config) -> None:
    kind, balance = config.moe.router.kind, config.moe.balance
    if balance.load and kind != "noisy":
        raise ConfigError(
            "moe.balance.load",
            balance.load,
            f"is smooth by the noise of a noisy router, and {kind} has none",
            "use router.kind=noisy",
        )
    if balance.bias and kind in WITHOUT_ORDER:
        raise ConfigError(
            "moe.balance.bias", balance.bias, f"moves choices by score, and router {kind} makes none", "set it to 0"
        )


def _rest(config: Config) -> None:
    for name, value in _values(config, "optim.beta1 optim.beta2"):
        if value >= 1:
            raise ConfigError(name, value, "must be below 1", "use the default")
    if not 0.0 < config.data.holdout < 1.0:
        raise ConfigError("data.holdout", config.data.holdout, "must be between 0 and 1, both excluded", "use 0.05")
    unknown = set(config.tracking.trackers) - {"wandb", "tensorboard"}
    if unknown:
        raise ConfigError(
            "tracking.trackers", sorted(unknown)[0], "must be wandb or tensorboard", "metrics.jsonl is always written"
        )


def _ranges(config: Config) -> None:
    for name, value in _values(config, AT_LEAST_ONE):
        if value < 1:
            raise ConfigError(name, value, "must be 1 or more", "use 1")
    for name, value in _values(config, NOT_NEGATIVE):
        if value < 0:
            raise ConfigError(name, value, "must not be negative", "use 0")
    for name, value in _values(config, f"{POSITIVE} {OPTIONAL_POSITIVE}"):
        if value <= 0:
            raise ConfigError(name, value, "must be greater than 0", "use a positive number or leave it out")
    for name, value in _values(config, AT_MOST_ONE):
        if not 0 <= value <= 1:
            raise ConfigError(name, value, "must be between 0 and 1", "use the default")


def _values(config: Config, names: str) -> Iterator[tuple[str, float]]:
    for name in names.split():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None:
            assert isinstance(value, int | float), name
            yield name, value
