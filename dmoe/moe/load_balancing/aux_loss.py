"""Which auxiliary losses are in force, and this rank's share of each.

A loss is a number for each *unit* (a sequence, a micro-batch of one virtual rank, or the global micro-batch), and what is trained on
is its mean over all units. Every function here returns this rank's *share* of that mean: summed over the data ranks, the shares are
the mean. So the loss of a run is the same number on any number of ranks, and a single process reads the loss itself. Choices are
counted before any drop; padding counts nowhere; a unit of padding alone costs 0 but is a unit.

Cost: one all-reduce of E + 1 int64 a layer if `switch_level` is `global`, else no collective. No host sync.

Letters: L MoE layers, E experts, U units on this rank.
"""

from __future__ import annotations

from torch import Tensor

from dmoe.config.schema import BalanceConfig
from dmoe.moe.comm import DataParallelComm
from dmoe.moe.load_balancing.losses import (
    importance_loss,
    load_loss,
    switch_loss,
    switch_loss_global,
    usage_std_loss,
    z_loss,
)
from dmoe.moe.routing import Routing, TokenContext

LOSSES = ("switch", "z", "importance", "load", "usage_std")
"""Fields of `BalanceConfig` that are coefficients of a loss. `bias` is none: it changes the choice, not the loss."""


def coefficients(config: BalanceConfig) -> dict[str, float]:
    """The auxiliary losses in force and their coefficients, by name, always in the same order."""
    return {name: getattr(config, name) for name in LOSSES if getattr(config, name) != 0.0}


def auxiliary_losses(
    routing: Routing,
    config: BalanceConfig,
    context: TokenContext,
    comm: DataParallelComm,
    *,
    layer: int,
    micro_batches: int,
) -> dict[str, Tensor]:
    """This rank's share of each loss in force, unweighted, by name. `routing` is the router's, before the capacity."""

    def share(loss_U: Tensor) -> Tensor:
        return loss_U.sum() / (max(1, len(loss_U)) * comm.size)  # as many units on every rank

    valid_T = context.valid_T
    losses = {}
    for name in coefficients(config):
        if name == "switch" and config.switch_level == "global":
            prior_E = None if context.prior_count_LE is None else context.prior_count_LE[layer]
            losses[name] = switch_loss_global(routing, prior_E, valid_T, comm)
        elif name == "switch":
            units = context.sequences if config.switch_level == "sequence" else micro_batches
            losses[name] = share(switch_loss(routing, valid_T, units))
        elif name == "z":
            losses[name] = share(z_loss(routing.logit_TE, valid_T, micro_batches))
        elif name == "importance":
            losses[name] = share(importance_loss(routing.score_TE, valid_T, micro_batches))
        elif name == "load":
            losses[name] = share(load_loss(routing, valid_T, micro_batches))
        elif name == "usage_std":
            losses[name] = share(usage_std_loss(routing.score_TE, valid_T, micro_batches))
    return losses
