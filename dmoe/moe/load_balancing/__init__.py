"""Load balancing: auxiliary losses and the bias update."""

from dmoe.moe.load_balancing.bias import PendingCounts, updated_bias
from dmoe.moe.load_balancing.losses import auxiliary_losses, coefficients

__all__ = ["PendingCounts", "auxiliary_losses", "coefficients", "updated_bias"]
