"""Auxiliary-loss-free load balancing: a selection bias, updated once per step.

    b_e += u * sign(mean over experts of c  -  c_e);  then b -= mean(b) if recentered

c_e = assignments of e over the whole global batch, before any drop (counted after drops it would
hardly move: no expert can then exceed its capacity), each counted once even with activation
recomputation. u is the rate. Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1;
DeepSeek-V3, section 2.1.2. Without recentering the biases can drift together, which changes no
selection but costs precision.

Every rank computes it from the same counts by the same operations: equal bits, no broadcast. The
caller sums the counts, one stacked all-reduce for all layers per step. No host sync.

Letters: E experts.
"""

from __future__ import annotations

from torch import Tensor


def updated_bias(bias_E: Tensor, count_E: Tensor, rate: float, recenter: bool) -> Tensor:
    """Return the bias after a step.

    Args:
        bias_E: float32 or float64; any leading dimensions, such as layers.
        count_E: int64, assignments of the global batch; same shape.
        rate: u.
        recenter: subtract the mean afterwards.
    """
    num_experts = count_E.shape[-1]
    # sign(mean - c_e) = sign(sum - E * c_e), exact in integers: a mean rounded in floating point
    # could move an expert that is exactly at the mean
    direction_E = (count_E.sum(-1, keepdim=True) - num_experts * count_E).sign()
    bias_E = bias_E.detach() + rate * direction_E.to(bias_E.dtype)
    return bias_E - bias_E.mean(-1, keepdim=True) if recenter else bias_E
