"""Forced routing (`moe.router.kind=workload`): which workloads a layer can have."""

from __future__ import annotations

from fractions import Fraction

from dmoe.config.errors import ConfigError
from dmoe.config.schema import RouterConfig


def check_workload(router: RouterConfig, num_experts: int, top_k: int) -> None:
    """Refuse a workload whose tokens could not have K distinct experts.

    Args:
        router: its settings.
        num_experts: E.
        top_k: K.

    Raises:
        ConfigError: the first reason found.
    """
    if router.workload in ("W0", "W4"):
        return
    ranks = router.ranks
    if num_experts % ranks:
        allowed = f"must divide moe.num_experts={num_experts} for {router.workload}"
        divisors = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
        fix = f"use one of {divisors}" if divisors else "use another number of experts"
        raise ConfigError("moe.router.ranks", ranks, allowed, fix)
    if router.workload == "W5":
        others = num_experts - num_experts // ranks
        if top_k > others:
            allowed = f"must be at most {others}, the experts of W5 that are not empty"
            raise ConfigError("moe.top_k", top_k, allowed, f"use {others} or less")
        return
    most = min(Fraction(ranks), Fraction(num_experts, top_k))
    if Fraction(router.hot).limit_denominator(1000) > most:
        allowed = (
            f"must be at most {float(most):g}, the smaller of moe.router.ranks={ranks} and "
            f"moe.num_experts / moe.top_k = {num_experts / top_k:g}"
        )
        raise ConfigError("moe.router.hot", router.hot, allowed, f"use {float(most):g} or less")
