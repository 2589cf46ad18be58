"""Options of `dmoe bench` that have rules of their own. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import WORKLOADS
from dmoe.config.rules.workload import check_workload
from dmoe.config.schema import RouterConfig
from dmoe.config.schema.constraints import check_bounds


def forced_router(
    workload: str | None, hot: float, experts: int, top_k: int
) -> RouterConfig | None:
    """Return the router of a workload; None without one. Raises ConfigError."""
    if workload is None:
        return None
    if workload not in WORKLOADS:
        allowed = f"must be one of {', '.join(WORKLOADS)}"
        raise ConfigError("--workload", workload, allowed, "use W2, a hot rank")
    named: Any = workload
    ranks = next((n for n in range(8, 1, -1) if experts % n == 0), 8)
    router = RouterConfig(kind="workload", workload=named, ranks=ranks, hot=hot)
    try:
        check_bounds(router, "--")
        check_workload(router, experts, top_k)
    except ConfigError as error:
        options = {"moe.num_experts": "--experts", "moe.router.": "--", "moe.top_k": "--top-k"}
        raise error.renamed(options) from None
    return router


def chosen_libraries(given: str | None, known: Iterable[str]) -> tuple[str, ...] | None:
    """Return the names in a list separated by commas; None without one. Raises ConfigError."""
    if given is None:
        return None
    names = tuple(given.split(","))
    if not set(names) <= set(known):
        allowed = f"must be names out of {', '.join(known)}, separated by commas"
        raise ConfigError("--libraries", given, allowed, "use transformers")
    return names


CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": ("bf16", "fp32"),
    "exchange": ("packed", "padded"),
    "shape": ("mixtral", "quickstart"),
}


def check_choices(**given: str) -> None:
    """Refuse a value that is none of its option's.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    for name, value in given.items():
        if value not in CHOICES[name]:
            allowed = f"must be {' or '.join(CHOICES[name])}"
            raise ConfigError(f"--{name}", value, allowed, f"use {CHOICES[name][0]}")
    if given.get("device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device", "cuda", "needs a GPU, and there is none", "use cpu")
