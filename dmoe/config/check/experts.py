"""Experts of different shape, and experts that cost nothing: what fits together."""

from __future__ import annotations

from dmoe.config.check.model import moe_blocks, moe_widths
from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig, Config, ExpertsConfig, RouterConfig
from dmoe.config.shapes import multiply_adds, shapes_of, zero_cost

__all__ = ["check_experts", "check_shapes", "check_zero_cost"]

WIDEST = 1 << 24
DEEPEST = 100
CHOOSES_ZERO_COST = ("top_k", "noisy", "adaptive", "budget")
"""Routers that rank a token's experts one by one. The others count on every expert doing the same work, or on its having a queue."""


def check_experts(config: Config) -> None:
    moe = config.moe
    check_shapes(moe.experts, moe.num_experts)
    check_zero_cost(moe.experts, moe.router, moe.capacity)
    if not moe_widths(config):
        return
    if moe.experts.shapes and len(moe_blocks(config)) < config.model.layers and config.model.dense_dim is None:
        allowed = "has no default beside moe.experts.shapes: no one width is active in a MoE layer"
        raise ConfigError("model.dense_dim", None, allowed, "give the width of the dense blocks")
    if moe.router.kind == "budget" and not zero_cost(moe.experts):
        _affordable(config)


def check_shapes(experts: ExpertsConfig, num_experts: int) -> None:
    """Raises ConfigError for shapes that are not those of `num_experts` experts."""
    if not experts.shapes:
        return
    if len(experts.shapes) != num_experts:
        allowed = f"must be the number of moe.experts.shapes, {len(experts.shapes)}"
        raise ConfigError("moe.num_experts", num_experts, allowed, f"use {len(experts.shapes)}")
    for shape in experts.shapes:
        if len(shape) > DEEPEST or any(not 1 <= width <= WIDEST for width in shape):
            allowed = f"holds {shape}: hidden widths are from 1 to {WIDEST}, at most {DEEPEST} of an expert"
            raise ConfigError("moe.experts.shapes", experts.shapes, allowed, "write [] for one linear map")


def check_zero_cost(experts: ExpertsConfig, router: RouterConfig, capacity: CapacityConfig) -> None:
    """Raises ConfigError where experts that cost nothing have no meaning."""
    if not zero_cost(experts):
        return
    field = next(name for name in ("zero", "copy", "constant") if getattr(experts, name))
    given = getattr(experts, field)
    if router.kind not in CHOOSES_ZERO_COST:
        allowed = (
            f"zero-cost experts have no meaning for moe.router.kind={router.kind}, only for {', '.join(CHOOSES_ZERO_COST)}"
        )
        raise ConfigError(f"moe.experts.{field}", given, allowed, "use 0, or another router")
    if capacity.overflow == "next_choice":
        allowed = f"cannot be offered one of moe.experts.{field}={given}, which has no queue"
        raise ConfigError("moe.capacity.overflow", "next_choice", allowed, "use drop")


def _affordable(config: Config) -> None:
    moe = config.moe
    for dim, out_dim in set(moe_widths(config)):
        work = [multiply_adds(shape, dim, out_dim, moe.experts.kind) for shape in shapes_of(moe)]
        cheapest = min(work) / sum(work)
        if moe.router.budget < cheapest * (1 - 1e-9):
            allowed = f"is less than the cheapest expert costs, {cheapest:.3g} of all of them, so nothing would ever run"
            raise ConfigError("moe.router.budget", moe.router.budget, allowed, f"use {cheapest:.3g} or more")
