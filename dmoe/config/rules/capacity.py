"""Rules of expert capacity, given the router and the number of experts."""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import CapacityConfig, MoEConfig


def check_router_and_capacity(moe: MoEConfig) -> None:
    """Refuse a capacity that contradicts the kind of router. Raises ConfigError."""
    capacity, spec = moe.capacity, router_spec(moe.router.kind)
    if spec.looks_ahead and capacity.group == "global":
        allowed = f"{moe.router.kind} cannot compare tokens of all ranks"
        raise ConfigError("moe.capacity.group", "global", allowed, "use rank")
    for field in ("factor", "eval_factor"):
        factor = getattr(capacity, field)
        if spec.all_experts and factor is not None and factor < 1:
            allowed = (
                f"must be at least 1 for moe.router.kind={moe.router.kind}: every token needs a "
                "slot with every expert"
            )
            raise ConfigError(f"moe.capacity.{field}", factor, allowed, "use 1.0 or leave it out")


def check_capacity(moe: MoEConfig) -> None:
    """Refuse a policy of drops that means nothing for this layer. Raises ConfigError."""
    capacity, spec = moe.capacity, router_spec(moe.router.kind)
    if capacity.renormalize and spec.ranks_experts:
        field, fewest = "top_k", moe.top_k
        if "k_min" in spec.reads:
            field, fewest = "router.k_min", moe.router.k_min
        reason = f"moe.router.kind={moe.router.kind}" if spec.has_budget else f"moe.{field}=1"
        if spec.has_budget or fewest == 1:
            allowed = (
                f"with {reason} makes the weight of an expert that is alone 1 and starves the "
                "router of gradient"
            )
            raise ConfigError("moe.capacity.renormalize", True, allowed, "set it to false")
    check_pool(capacity, moe.num_experts, moe.router.kind)
    if capacity.overflow != "next_choice":
        return
    fix = "use drop"
    if capacity.factor is None and capacity.eval_factor is None:
        allowed, fix = "needs a capacity that overflows", "set moe.capacity.factor, e.g. to 1.25"
    elif not spec.ranks_experts:
        allowed = f"needs a next expert, which router {moe.router.kind} has not"
    elif spec.has_budget:
        allowed = "needs a next expert, and which one a budget affords depends on what was dropped"
    elif moe.top_k == moe.num_experts and not spec.variable_k:
        allowed = "needs a next expert, but moe.top_k chooses all of them"
    else:
        return
    raise ConfigError("moe.capacity.overflow", "next_choice", allowed, fix)


def check_pool(capacity: CapacityConfig, num_experts: int, kind: str = "top_k") -> None:
    """Refuse slots that cannot be shared. Raises ConfigError.

    Args:
        capacity: section `moe.capacity`.
        num_experts: experts with slots, over all ranks.
        kind: of the router.
    """
    pool, spec = capacity.pool, router_spec(kind)
    if pool == 1 and capacity.pool_floor != 1.0:
        allowed = "is a share of the slots that moe.capacity.pool experts share"
        fix = "set moe.capacity.pool, e.g. to 4, or leave it out"
        raise ConfigError("moe.capacity.pool_floor", capacity.pool_floor, allowed, fix)
    if pool == 1:
        return
    if capacity.factor is None and capacity.eval_factor is None:
        allowed, fix = "shares slots, and there are none", "set moe.capacity.factor, e.g. to 1.25"
    elif spec.all_experts or spec.looks_ahead:
        allowed = f"shares slots, and no expert overflows with moe.router.kind={kind}"
        fix = "leave it out"
    elif num_experts % pool:
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        allowed, fix = f"must divide moe.num_experts={num_experts}", f"use one of {divisors}"
    else:
        return
    raise ConfigError("moe.capacity.pool", pool, allowed, fix)
