"""Losses and counts of the modules, in the output of the model they are on.

Mixture layers return theirs; a module's layer is called by a hook, whose place in the network has nowhere to hand them on. So a hook on
the whole model collects them at the end of a forward in training, before DDP or FSDP2 look at its output.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from dmoe.config.schema import BalanceConfig
from dmoe.models.output import ModelOutput
from dmoe.modular import layers

__all__ = ["tell_of_modules"]


def tell_of_modules(model: nn.Module, balance: BalanceConfig) -> None:
    """From now on the outputs of `model` have `module_aux` and `module_stats`. After `attach`, before the model is wrapped."""
    model.register_forward_hook(partial(_tell, balance))


def _tell(balance: BalanceConfig, model: nn.Module, args: tuple[Any, ...], output: ModelOutput) -> None:
    if model.training:
        for layer in layers(model).values():
            output.module_aux.append(layer.losses(balance))
            output.module_stats.append(layer.stats())
