"""Zero-cost experts.

Jin et al. 2024, "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts":

    zero(x) = 0        copy(x) = x        constant_j(x) = v_j, a trainable vector

They let a token spend less compute: none, its own vector, or one vector for all tokens. Their ids
follow those of the real experts, in this order. They are selected and weighted like any other
expert and count for load balancing, but have no queue, so no capacity, and are computed on the
token's rank: no dispatch. The paper's constant expert mixes `a x + b v` with learned a and b, adds
the previous layer's router logits, and weights zero-cost experts less in the load-balancing loss;
none of that is implemented.

Cost: a scatter of [T, K] weights into [T, E], one product [T, D] if there are copies, [T, J] x [J,
M] for J constants. No collective (the vectors are replicated and their gradients summed like any
dense parameter), no host sync.

Letters: T tokens, D input width, M output width, E experts (zero-cost ones included), K experts per
token, J constants.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import count_zero_cost
from dmoe.config.schema import ExpertsConfig
from dmoe.moe.rng import normal_
from dmoe.moe.routing import DispatchPlan, masked


def add_copies(y_TM: Tensor, x_TD: Tensor, plan: DispatchPlan, first: int, count: int) -> Tensor:
    """Add to `y_TM`, in its dtype, the weighted inputs of tokens that chose a copy.

    Args:
        y_TM: what the computed experts gave; M = D.
        x_TD: the tokens.
        plan: of all experts.
        first: id of the first copy.
        count: number of copies.
    """
    is_copy_TK = (plan.expert_TK >= first) & (plan.expert_TK < first + count) & plan.is_kept_TK
    share_T1 = plan.weight_TK.masked_fill(~is_copy_TK, 0.0).sum(1, keepdim=True)
    # a token that is not copied may hold a NaN, and 0 x NaN is NaN
    return y_TM + (share_T1 * masked(x_TD, is_copy_TK.any(1))).to(y_TM.dtype)


class ZeroCost(nn.Module):
    """The experts of highest ids: `zero`, then `copy`, then `constant`, `num_experts` in total."""

    constant_JM: Tensor | None

    def __init__(self, config: ExpertsConfig, out_dim: int) -> None:
        super().__init__()
        self.zero, self.copy, self.constant = config.zero, config.copy, config.constant
        self.num_experts = count_zero_cost(config)
        vectors = nn.Parameter(torch.empty(config.constant, out_dim)) if config.constant else None
        self.register_parameter("constant_JM", vectors)

    @property
    def names(self) -> list[str]:
        """The kind of each, in the order of ids."""
        return ["zero"] * self.zero + ["copy"] * self.copy + ["constant"] * self.constant

    def forward(self, y_TM: Tensor, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """Add the weighted outputs of these experts' kept assignments to `y_TM`, in its dtype."""
        weight_TK = plan.weight_TK
        if plan.keep_TK is not None:
            weight_TK = weight_TK.masked_fill(~plan.keep_TK, 0.0)
        zero_TE = weight_TK.new_zeros(len(weight_TK), plan.num_experts)
        weight_TE = zero_TE.scatter_add(1, plan.expert_TK, weight_TK)
        # column of the first copy
        first = weight_TE.shape[1] - self.num_experts + self.zero
        if self.copy:
            y_TM = add_copies(y_TM, x_TD, plan, first, self.copy)
        if self.constant_JM is not None:
            share_TJ = weight_TE[:, first + self.copy :].to(y_TM.dtype)
            y_TM = y_TM + share_TJ @ self.constant_JM.to(y_TM.dtype)
        return y_TM

    def initialize(self, seed: int, name: str, std: float) -> None:
        if self.constant_JM is not None:
            normal_(self.constant_JM, std, seed, name, "constant")
