"""Keeping the experts in use: auxiliary losses and the bias controller, one mechanism a file, each beside its naive reference."""

from dmoe.moe.balance.auxiliary import auxiliary_losses, coefficients
from dmoe.moe.balance.bias import updated_bias
from dmoe.moe.balance.load import load_loss, smooth_load
from dmoe.moe.balance.spread import importance_loss, usage_std_loss
from dmoe.moe.balance.switch import switch_loss, switch_loss_global
from dmoe.moe.balance.units import choice_count
from dmoe.moe.balance.z import z_loss

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
