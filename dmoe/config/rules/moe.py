"""The MoE layers of a run: their settings, and the model around them."""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import ROUTERS
from dmoe.config.rules.layer import check_layer, check_widths
from dmoe.config.rules.model import moe_blocks, moe_widths
from dmoe.config.schema import Config


def check_moe(config: Config) -> None:
    """Refuse settings of the MoE layers that do not fit together.

    Raises:
        ConfigError: the first reason found.
    """
    check_layer(config.moe)
    _check_causal(config)
    widths = moe_widths(config)
    if not widths:
        return
    model = config.model
    has_dense = len(moe_blocks(config)) < model.layers
    if config.moe.experts.shapes and has_dense and model.dense_dim is None:
        allowed = "has no default beside moe.experts.shapes: no one width is active in a MoE layer"
        raise ConfigError("model.dense_dim", None, allowed, "give the width of the dense blocks")
    for dim, out_dim in set(widths):
        check_widths(config.moe, dim, out_dim)


def _check_causal(config: Config) -> None:
    """Refuse what a router must not do in a causal language model."""
    router = config.moe.router
    spec = ROUTERS[router.kind]
    if config.train.task != "language_modelling" or router.allow_future_leak:
        return
    if spec.looks_ahead:
        allowed = (
            "looks at later tokens of a sequence to choose among earlier ones, which a causal "
            "model must not"
        )
        fix = "use top_k, or accept it with moe.router.allow_future_leak=true"
        raise ConfigError("moe.router.kind", router.kind, allowed, fix)
    if router.per == "sequence":
        allowed = (
            "routes a token by the mean over its whole sequence, later tokens included, which a "
            "causal model must not"
        )
        fix = "use token, or accept it with moe.router.allow_future_leak=true"
        raise ConfigError("moe.router.per", "sequence", allowed, fix)
