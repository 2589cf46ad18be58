"""One MoE layer: what its settings must be wherever it is built, by a config file or by Python.

`check_moe` checks them for a run, `dmoe.MoE` for its arguments and `build_router` for a router.
"""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import (
    check_shapes,
    count_choices,
    count_zero_cost,
    expert_shapes,
    multiply_adds,
)
from dmoe.config.router_kinds import kinds_that_read, kinds_where, router_spec
from dmoe.config.rules.capacity import check_capacity, check_router_and_capacity
from dmoe.config.rules.workload import check_workload
from dmoe.config.schema import (
    CapacityConfig,
    ExpertsConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RouterConfig,
    TrainConfig,
)
from dmoe.config.schema.constraints import check_bounds, check_field, check_types

ARGUMENTS = {
    "dim": (ModelConfig, "dim"),
    "out_dim": (ModelConfig, "dim"),
    "virtual_ranks": (ParallelConfig, "virtual_ranks"),
    "layer": (ModelConfig, "moe_every"),
    "seed": (TrainConfig, "seed"),
}
"""Arguments of `dmoe.MoE` that are not in section `moe`, and the field that has the same bounds."""


def check_arguments(moe: MoEConfig, **arguments: int) -> None:
    """Refuse arguments of `dmoe.MoE` that a config file could not have, by the same rules.

    Args:
        moe: those of section `moe`.
        arguments: those of `ARGUMENTS`.

    Raises:
        ConfigError: the first reason found; it calls a field as the arguments do.
    """
    for name, value in arguments.items():
        check_field(*ARGUMENTS[name], name, value)
    try:
        check_types(moe, "moe.")
        check_fields_read(moe.router)
        check_bounds(moe, "moe.")
        check_layer(moe)
        check_widths(moe, arguments["dim"], arguments["out_dim"])
    except ConfigError as error:
        raise error.renamed({"moe.": ""}) from None


def check_layer(moe: MoEConfig) -> None:
    """Refuse settings of a layer that do not fit together, whatever model it is in.

    Raises:
        ConfigError: the first reason found.
    """
    choices = count_choices(moe)
    if moe.top_k > choices:
        what = f"moe.num_experts={choices}"
        if choices != moe.num_experts:
            what = f"the {choices} experts, zero-cost ones included"
        fix = f"use {choices} or less"
        raise ConfigError("moe.top_k", moe.top_k, f"must be at most {what}", fix)
    check_router(moe.router, choices, moe.top_k)
    check_shapes(moe.experts, moe.num_experts)
    read = not moe.experts.shapes or (moe.experts.shared and moe.experts.shared_dim is None)
    if read and moe.expert_dim < 1:
        raise ConfigError("moe.expert_dim", moe.expert_dim, "must be 1 or more", "use 1")
    check_zero_cost(moe.experts, moe.router, moe.capacity)
    check_router_and_capacity(moe)
    if moe.exchange == "padded" and moe.capacity.factor is None:
        allowed = "sends a fixed number of slots and so needs moe.capacity.factor"
        raise ConfigError("moe.exchange", "padded", allowed, "set it, e.g. to 1.25")
    check_capacity(moe)
    _check_balance(moe)


def check_fields_read(router: RouterConfig) -> None:
    """Refuse a field that differs from its default although this kind of router does not read it.

    Raises:
        ConfigError: for the first such field.
    """
    for field, default in vars(RouterConfig()).items():
        value, kinds = getattr(router, field), kinds_that_read(field)
        if value != default and kinds and field not in router_spec(router.kind).reads:
            only = ", ".join(kinds)
            allowed = f"has no meaning for moe.router.kind={router.kind}, only for {only}"
            raise ConfigError(
                f"moe.router.{field}", value, allowed, f"leave moe.router.{field} out"
            )


def check_router(router: RouterConfig, num_experts: int, top_k: int) -> None:
    """Refuse settings of a router that mean nothing in any layer.

    Args:
        router: its settings.
        num_experts: experts it chooses among, zero-cost ones included.
        top_k: experts per token.

    Raises:
        ConfigError: the first reason found.
    """
    check_types(router, "moe.router.")
    check_fields_read(router)
    check_bounds(router, "moe.router.")
    _check_gradient(router, top_k)
    spec = router_spec(router.kind)
    if "groups" in spec.reads:
        _check_groups(router, num_experts, top_k)
    elif "workload" in spec.reads:
        check_workload(router, num_experts, top_k)
    elif "top_p" in spec.reads:
        _check_adaptive(router, top_k)
    elif spec.all_experts and top_k != num_experts:
        allowed = (
            f"must be moe.num_experts={num_experts} for moe.router.kind={router.kind}, "
            "which sends a token to every expert"
        )
        raise ConfigError("moe.top_k", top_k, allowed, f"use {num_experts}")


def _check_gradient(router: RouterConfig, top_k: int) -> None:
    """Refuse weights that are 1 whatever the logits are: the router would have no gradient."""
    spec = router_spec(router.kind)
    if spec.has_noise and top_k == 1:
        allowed = (
            f"with moe.router.kind={router.kind} makes every weight 1 and starves the router of "
            "gradient"
        )
        fix = "use 2 or more, or moe.router.kind=top_k with moe.router.jitter"
        raise ConfigError("moe.top_k", 1, allowed, fix)
    if spec.has_budget and router.renormalize:
        allowed = (
            f"with moe.router.kind={router.kind} gives a token of one expert weight 1, from which "
            "its router learns nothing"
        )
        raise ConfigError("moe.router.renormalize", True, allowed, "set it to false")
    if spec.normalizable and top_k == 1:
        allowed = "with moe.top_k=1 makes every weight 1 and starves the router of gradient"
        if router.renormalize:
            raise ConfigError("moe.router.renormalize", True, allowed, "set it to false")
        if router.weights_from == "chosen" and router.score == "softmax":
            raise ConfigError("moe.router.weights_from", "chosen", allowed, "use all")


def _check_groups(router: RouterConfig, num_experts: int, top_k: int) -> None:
    groups, topk_groups = router.groups, router.topk_groups
    if groups < 1 or num_experts % groups:
        allowed = f"must divide moe.num_experts={num_experts}"
        divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        raise ConfigError("moe.router.groups", groups, allowed, f"use one of {divisors}")
    if not 1 <= topk_groups <= groups:
        allowed = f"must be between 1 and moe.router.groups={groups}"
        raise ConfigError("moe.router.topk_groups", topk_groups, allowed, f"use {groups} or less")
    eligible = topk_groups * num_experts // groups
    if top_k > eligible:
        allowed = (
            f"must be at most the {eligible} experts of moe.router.topk_groups={topk_groups} groups"
        )
        raise ConfigError(
            "moe.top_k", top_k, allowed, f"use {eligible} or less, or more topk_groups"
        )


def _check_adaptive(router: RouterConfig, top_k: int) -> None:
    if not 1 <= router.k_min <= top_k:
        allowed = f"must be from 1 to moe.top_k={top_k}"
        raise ConfigError("moe.router.k_min", router.k_min, allowed, f"use {top_k} or less")
    allowed = (
        "with moe.router.k_min=1 gives a token of one expert weight 1, from which its router "
        "learns nothing"
    )
    for field, refused, fix in (("renormalize", True, "false"), ("weights_from", "chosen", "all")):
        if router.k_min == 1 and getattr(router, field) == refused:
            fix = f"set it to {fix}, or moe.router.k_min=2"
            raise ConfigError(f"moe.router.{field}", refused, allowed, fix)


def _check_balance(moe: MoEConfig) -> None:
    kind, spec, balance = moe.router.kind, router_spec(moe.router.kind), moe.balance
    if balance.load and not spec.has_noise:
        allowed = f"is smooth by the noise of a noisy router, and {kind} has none"
        raise ConfigError("moe.balance.load", balance.load, allowed, "use router.kind=noisy")
    if balance.pooled:
        allowed = "is the loss of transformers, which pools the layers of a published model"
        raise ConfigError("moe.balance.pooled", balance.pooled, allowed, "use moe.balance.switch")
    if balance.bias and moe.router.freeze:
        allowed = "moves the choices of a router that moe.router.freeze=true keeps as it is"
        raise ConfigError("moe.balance.bias", balance.bias, allowed, "set it to 0")
    if balance.bias and not spec.ranks_experts:
        allowed = f"moves choices by score, and router {kind} makes none"
        raise ConfigError("moe.balance.bias", balance.bias, allowed, "set it to 0")


def check_zero_cost(experts: ExpertsConfig, router: RouterConfig, capacity: CapacityConfig) -> None:
    """Refuse zero-cost experts where they have no meaning.

    Raises:
        ConfigError: a router that cannot choose them, or an overflow that needs their queue.
    """
    if not count_zero_cost(experts):
        return
    field = next(name for name in ("zero", "copy", "constant") if getattr(experts, name))
    count = getattr(experts, field)
    if not router_spec(router.kind).zero_cost_experts:
        only = ", ".join(kinds_where(zero_cost_experts=True))
        allowed = (
            f"zero-cost experts have no meaning for moe.router.kind={router.kind}, only for {only}"
        )
        raise ConfigError(f"moe.experts.{field}", count, allowed, "use 0, or another router")
    if capacity.overflow == "next_choice":
        allowed = f"cannot be offered one of moe.experts.{field}={count}, which has no queue"
        raise ConfigError("moe.capacity.overflow", "next_choice", allowed, "use drop")


def check_widths(moe: MoEConfig, dim: int, out_dim: int) -> None:
    """Refuse experts and budgets that mean nothing for a layer of these widths.

    Raises:
        ConfigError: a copy of another width than the output's; a budget that not even the cheapest
            expert fits.
    """
    if moe.experts.copy and dim != out_dim:
        allowed = f"a copy of width {dim} is no output of width {out_dim}"
        raise ConfigError("moe.experts.copy", moe.experts.copy, allowed, "use 0")
    if not router_spec(moe.router.kind).has_budget or count_zero_cost(moe.experts):
        return
    costs = [multiply_adds(shape, dim, out_dim, moe.experts.kind) for shape in expert_shapes(moe)]
    cheapest = min(costs) / sum(costs)
    if moe.router.budget < cheapest * (1 - 1e-9):
        allowed = (
            f"is less than the cheapest expert costs, {cheapest:.3g} of all of them, so "
            "nothing would ever run"
        )
        fix = f"use {cheapest:.3g} or more"
        raise ConfigError("moe.router.budget", moe.router.budget, allowed, fix)
