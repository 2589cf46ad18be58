"""One more module in every bank. The others, and the core, keep their bits."""

from __future__ import annotations

from torch import nn

from dmoe.config.errors import ConfigError
from dmoe.modular.attach import layers
from dmoe.modular.routing import check_grows, grow_router

__all__ = ["grow"]


def grow(model: nn.Module, count: int = 1, *, seed: int = 0) -> range:
    """Add `count` fresh modules to every bank and tell the routers; returns their ids.

    Module m has the weights it would have had in a bank that was made with it. Before sharding, before the optimizer.
    Raises: ConfigError where a bank is sharded, banks differ in size, or a router or an aggregation cannot grow; then nothing is
    changed.
    """
    found = layers(model)
    sizes = {layer.experts.num_modules for layer in found.values()}
    if len(sizes) != 1:
        raise ConfigError(
            "modules", sorted(sizes), "must be one number for all banks, and there must be a bank", "attach banks of one size"
        )
    for name, layer in found.items():
        if not layer.experts.whole:
            raise ConfigError("modules", name, "holds a part of its modules only", "grow it before sharding")
        if layer.aggregation.per_choice and layer.router.top_k == layer.experts.num_modules:
            kind = type(layer.aggregation).__name__
            raise ConfigError(
                "aggregation", kind, "has parameters for each of the modules there are", "use weighted_sum or attention"
            )
        check_grows(layer.router)
    for layer in found.values():
        grow_router(layer.router, count, seed)
    before = sizes.pop()
    for layer in found.values():
        layer.experts.grow(count)
    return range(before, before + count)
