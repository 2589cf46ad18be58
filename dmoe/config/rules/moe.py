"""The mixture layer around its router: capacity, overflow, exchange and balance.

Experts of different shape, and experts that cost nothing: what fits together.
"""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import all_choices, multiply_adds, shapes_of, zero_cost
from dmoe.config.rules.model import moe_blocks, moe_widths
from dmoe.config.rules.router import WITHOUT_ORDER, check_router
from dmoe.config.schema import CapacityConfig, Config, ExpertsConfig, RouterConfig


def check_moe(config: Config) -> None:
    moe, choices = config.moe, all_choices(config.moe)
    if moe.top_k > choices:
        what = (
            f"moe.num_experts={choices}"
            if choices == moe.num_experts
            else f"the {choices} experts, zero-cost ones included"
        )
        raise ConfigError(
            "moe.top_k", moe.top_k, f"must be at most {what}", f"use {choices} or less"
        )
    check_router(moe.router, choices, moe.top_k)
    check_experts(config)
    _router_in_model(config)
    if moe.exchange == "padded" and moe.capacity.factor is None:
        raise ConfigError(
            "moe.exchange",
            "padded",
            "sends a fixed number of slots and so needs moe.capacity.factor",
            "set it, e.g. to 1.25",
        )
    _capacity(config)
    _balance(config)


def _router_in_model(config: Config) -> None:
    """What a router cannot do inside a causal language model or together with a capacity."""
    router, limits = config.moe.router, config.moe.capacity
    causal = config.train.task == "language_modelling"
    if router.kind == "expert_choice":
        if causal and not router.allow_future_leak:
            allowed = "looks at later tokens of a sequence to choose among earlier ones, which a causal model must not"
            fix = "use top_k, or accept it with moe.router.allow_future_leak=true"
            raise ConfigError("moe.router.kind", router.kind, allowed, fix)
        if limits.group == "global":
            raise ConfigError(
                "moe.capacity.group",
                "global",
                "expert_choice cannot compare tokens of all ranks",
                "use rank",
            )
    if (
        router.kind == "budget"
        and router.per == "sequence"
        and causal
        and not router.allow_future_leak
    ):
        allowed = "routes a token by the mean over its whole sequence, later tokens included, which a causal model must not"
        raise ConfigError(
            "moe.router.per",
            "sequence",
            allowed,
            "use token, or accept it with moe.router.allow_future_leak=true",
        )
    for field in ("factor", "eval_factor"):
        factor = getattr(limits, field)
        if router.kind == "soft" and factor is not None and factor < 1:
            allowed = "must be at least 1 for moe.router.kind=soft: every token needs a slot with every expert"
            raise ConfigError(f"moe.capacity.{field}", factor, allowed, "use 1.0 or leave it out")


def _capacity(config: Config) -> None:
    moe, capacity = config.moe, config.moe.capacity
    field, fewest = (
        ("router.k_min", moe.router.k_min)
        if moe.router.kind == "adaptive"
        else ("top_k", moe.top_k)
    )
    if capacity.renormalize and moe.router.kind == "budget":
        allowed = "with moe.router.kind=budget makes the weight of an expert that is alone 1 and starves the router of gradient"
        raise ConfigError("moe.capacity.renormalize", True, allowed, "set it to false")
    if capacity.renormalize and fewest == 1 and moe.router.kind not in WITHOUT_ORDER:
        allowed = f"with moe.{field}=1 makes the weight of an expert that is alone 1 and starves the router of gradient"
        raise ConfigError("moe.capacity.renormalize", True, allowed, "set it to false")
    if capacity.overflow != "next_choice":
        return
    if capacity.factor is None and capacity.eval_factor is None:
        raise ConfigError(
            "moe.capacity.overflow",
            "next_choice",
            "needs a capacity that overflows",
            "set moe.capacity.factor, e.g. to 1.25",
        )
    if moe.router.kind in WITHOUT_ORDER:
        raise ConfigError(
            "moe.capacity.overflow",
            "next_choice",
            f"needs a next expert, which router {moe.router.kind} has not",
            "use drop",
        )
    if moe.router.kind == "budget":
        allowed = "needs a next expert, and which one a budget affords depends on what was dropped"
        raise ConfigError("moe.capacity.overflow", "next_choice", allowed, "use drop")
    if moe.top_k == moe.num_experts and moe.router.kind != "adaptive":
        raise ConfigError(
            "moe.capacity.overflow",
            "next_choice",
            "needs a next expert, but moe.top_k chooses all of them",
            "use drop",
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
            "moe.balance.bias",
            balance.bias,
            f"moves choices by score, and router {kind} makes none",
            "set it to 0",
        )


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
    if (
        moe.experts.shapes
        and len(moe_blocks(config)) < config.model.layers
        and config.model.dense_dim is None
    ):
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
            raise ConfigError(
                "moe.experts.shapes", experts.shapes, allowed, "write [] for one linear map"
            )


def check_zero_cost(experts: ExpertsConfig, router: RouterConfig, capacity: CapacityConfig) -> None:
    """Raises ConfigError where experts that cost nothing have no meaning."""
    if not zero_cost(experts):
        return
    field = next(name for name in ("zero", "copy", "constant") if getattr(experts, name))
    given = getattr(experts, field)
    if router.kind not in CHOOSES_ZERO_COST:
        allowed = f"zero-cost experts have no meaning for moe.router.kind={router.kind}, only for {', '.join(CHOOSES_ZERO_COST)}"
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
            raise ConfigError(
                "moe.router.budget", moe.router.budget, allowed, f"use {cheapest:.3g} or more"
            )
