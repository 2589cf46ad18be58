"""Load balancing: auxiliary losses and the bias update."""

from dmoe.moe.load_balancing.auxiliary import auxiliary_losses, coefficients
from dmoe.moe.load_balancing.bias import PendingCounts, updated_bias

__all__ = ["PendingCounts", "auxiliary_losses", "coefficients", "updated_bias"]
