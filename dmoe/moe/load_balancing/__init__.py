"""Load balancing: auxiliary losses and the bias update."""

from dmoe.moe.load_balancing.bias import PendingCounts, updated_bias
from dmoe.moe.load_balancing.losses import auxiliary_losses, choice_count, coefficients

__all__ = ["PendingCounts", "auxiliary_losses", "choice_count", "coefficients", "updated_bias"]
