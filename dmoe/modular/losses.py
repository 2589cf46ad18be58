"""TODO docstring."""

from __future__ import annotations

from torch import Tensor, nn

from dmoe.config.schema import BalanceConfig
from dmoe.modular.attach import layers


def module_losses(model: nn.Module, balance: BalanceConfig) -> dict[str, dict[str, Tensor]]:
    """For each place that took part in the latest forward, this rank's share of each loss in force, unweighted, by name.

    Summed over the ranks, the shares are the loss. A place with a given routing has none. See `Modular.losses`.
    """
    return {
        name: layer.losses(balance)
        for name, layer in layers(model).items()
        if layer.chosen is not None
    }
