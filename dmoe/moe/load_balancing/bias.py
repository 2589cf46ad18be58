"""Balance without an auxiliary loss: a bias on the scores, which chooses and never weighs, nudged once a step.

    b_e += u * sign(mean over experts of c  -  c_e);  then b -= mean(b) if recentred

c_e = choices of e over the whole global batch, before any drop (counted after the drops it would hardly move: no expert can then
stand above its capacity), each counted once even under recomputation. u is the rate. Wang et al. 2024, "Auxiliary-loss-free load
balancing", algorithm 1; DeepSeek-V3, section 2.1.2. Without recentring the biases can drift together, which changes no choice but
costs precision.

Every rank computes it from the same counts by the same operations: equal bits, no broadcast. The caller sums the counts, one
stacked all-reduce for all layers a step. No host sync.

Letters: E experts.
"""

from __future__ import annotations

from torch import Tensor


def updated_bias(bias_E: Tensor, count_E: Tensor, rate: float, recenter: bool) -> Tensor:
    """The bias after a step; any leading dimensions, such as layers. `count_E` is int64."""
    num_experts = count_E.shape[-1]
    # sign(mean - c_e) = sign(sum - E * c_e), exact in integers: a mean rounded in float could push an expert that is just on it
    direction_E = (count_E.sum(-1, keepdim=True) - num_experts * count_E).sign()
    bias_E = bias_E.detach() + rate * direction_E.to(bias_E.dtype)
    return bias_E - bias_E.mean(-1, keepdim=True) if recenter else bias_E


def bias_reference(
    bias: list[float], counts: list[int], rate: float, recenter: bool
) -> list[float]:
    """`updated_bias` of one layer by a loop. For tests."""
    moved = []
    for value, chosen in zip(bias, counts, strict=True):
        if chosen * len(counts) < sum(counts):
            value += rate
        elif chosen * len(counts) > sum(counts):
            value -= rate
        moved.append(value)
    mean = sum(moved) / len(moved)
    return [value - mean for value in moved] if recenter else moved
