"""Keeping the experts in use: auxiliary losses and the bias controller, one mechanism a file, each beside its naive reference."""

from dmoe.moe.load_balancing.aux_loss import auxiliary_losses, coefficients
from dmoe.moe.load_balancing.bias import updated_bias
from dmoe.moe.load_balancing.groups import choice_count
from dmoe.moe.load_balancing.losses import (
    importance_loss,
    load_loss,
    smooth_load,
    switch_loss,
    switch_loss_global,
    usage_std_loss,
    z_loss,
)

__all__ = [
    "auxiliary_losses",
    "choice_count",
    "coefficients",
    "importance_loss",
    "load_loss",
    "smooth_load",
    "switch_loss",
    "switch_loss_global",
    "updated_bias",
    "usage_std_loss",
    "z_loss",
]
