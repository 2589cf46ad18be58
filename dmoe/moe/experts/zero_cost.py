"""Experts that cost nothing (Jin et al. 2024, "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts"):

    zero(x) = 0        copy(x) = x        constant_j(x) = v_j, a trainable vector

They let a token spend less: on nothing, on passing itself on, or on one vector for all. Their ids come after those of the real
experts, in this order. They are chosen and weighed like any other and count for balance, but have no queue, so no capacity, and are
computed where the token is: nothing travels. The paper's constant expert mixes `a x + b v` with learned a and b, adds the previous
layer's router logits, and weighs zero-cost experts less in the balance loss; none of that is here.

Cost: a scatter of [T, K] weights into [T, E], one product [T, D] if there are copies, [T, J] x [J, M] for J constants. No collective
(the vectors are replicated and their gradients summed like any dense one), no host sync.

Letters: T tokens, D width in, M width out, E experts with those of zero cost, K experts a token, J constants.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.expert_shapes import zero_cost
from dmoe.config.schema import ExpertsConfig
from dmoe.moe.rng import normal_
from dmoe.moe.routing import Routing


class ZeroCost(nn.Module):
    """The last experts of a layer. `num_experts` of them: `zero`, then `copy`, then `constant`."""

    constant_JM: Tensor | None

    def __init__(self, config: ExpertsConfig, dim: int, out_dim: int) -> None:
        super().__init__()
        if config.copy and dim != out_dim:
            raise ValueError(
                f"experts.copy={config.copy}: a copy of width {dim} is no output of width {out_dim}; use 0"
            )
        self.zero, self.copy, self.constant = config.zero, config.copy, config.constant
        self.num_experts = zero_cost(config)
        vectors = nn.Parameter(torch.empty(config.constant, out_dim)) if config.constant else None
        self.register_parameter("constant_JM", vectors)

    @property
    def names(self) -> list[str]:
        """What each of them is, in the order of ids."""
        return ["zero"] * self.zero + ["copy"] * self.copy + ["constant"] * self.constant

    def forward(self, y_TM: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
        """`y_TM` plus what the kept choices of these experts weigh and return, in its dtype."""
        weight_TK = routing.weight_TK
        if routing.keep_TK is not None:
            weight_TK = weight_TK.masked_fill(~routing.keep_TK, 0.0)
        weight_TE = torch.zeros_like(routing.score_TE).scatter_add(1, routing.expert_TK, weight_TK)
        first = weight_TE.shape[1] - self.num_experts + self.zero
        if self.copy:
            share_T1 = weight_TE[:, first : first + self.copy].sum(1, keepdim=True)
            y_TM = y_TM + (share_T1 * x_TD).to(y_TM.dtype)
        if self.constant_JM is not None:
            share_TJ = weight_TE[:, first + self.copy :].to(y_TM.dtype)
            y_TM = y_TM + share_TJ @ self.constant_JM.to(y_TM.dtype)
        return y_TM

    def initialize(self, seed: int, name: str, std: float) -> None:
        if self.constant_JM is not None:
            normal_(self.constant_JM, std, seed, name, "constant")


def zero_cost_reference(module: ZeroCost, x_TD: Tensor, routing: Routing) -> Tensor:
    """What `forward` adds, one token and choice at a time. For tests."""
    rows, first = [], routing.score_TE.shape[1] - module.num_experts
    for t, x in enumerate(x_TD):
        width = len(x) if module.constant_JM is None else module.constant_JM.shape[1]
        total = x.new_zeros(width)
        for k, expert in enumerate(routing.expert_TK[t].tolist()):
            if expert < first or not (routing.keep_TK is None or bool(routing.keep_TK[t, k])):
                continue
            name = module.names[expert - first]
            if name == "copy":
                total = total + routing.weight_TK[t, k] * x
            elif name == "constant":
                assert module.constant_JM is not None
                total = (
                    total
                    + routing.weight_TK[t, k]
                    * module.constant_JM[expert - first - module.zero - module.copy]
                )
        rows.append(total)
    return torch.stack(rows)
