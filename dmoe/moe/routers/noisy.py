"""Noisy top-k gating (Shazeer et al. 2017, section 2.1):

    H = x W_g^T + StandardNormal * softplus(x W_noise^T)                              (eq. 4)
    G = softmax(KeepTopK(H, K)),  KeepTopK sets all but the K largest to -infinity     (eq. 3, 5)

The noise lets a nearly good enough expert be tried, and makes the load differentiable:
`Routing.noise` is the input of the smooth load loss (appendix A). Evaluation routes by H = x W_g^T.
Both matrices are trained; W_noise starts at zero, as in the paper: softplus(0) = 0.69 of noise
everywhere. With K = 1 the weight is always 1 and W_g would learn nothing: the config check refuses
it. The selection is by softmax(H) + bias; without a bias that is the order of H.

Cost in addition to `base.py`: a second [T, D] x [D, E] product and T*E normal draws. No collective,
no host sync.

Letters: T tokens, D width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dmoe.config.schema import RouterConfig
from dmoe.moe.rng import keyed_noise
from dmoe.moe.routers.base import LearnedRouter, gate_scores
from dmoe.moe.routers.projection import project
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Noise, Routing, TokenContext


class NoisyRouter(LearnedRouter):
    """Selects the K experts of largest noisy score."""

    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        # `weights_from: chosen` is the softmax over the kept logits, which sums to 1 as it is
        config = replace(config, score="softmax", weights_from="chosen", renormalize=False)
        super().__init__(config, dim, num_experts, top_k, layer)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        super().initialize(seed, layer, std)
        nn.init.zeros_(self.noise_weight)

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        """Raise ValueError in training without `context.noise_key`."""
        x_TD = self.router_input(x_TD, context, shape)
        clean_TE = project(x_TD, self.weight)
        raw_TE = project(x_TD, self.noise_weight)
        std_TE = softplus(raw_TE)
        logit_TE = clean_TE
        if self.training:
            normal_TE = keyed_noise(
                torch.randn, "noise", clean_TE, self.num_experts, self.layer, context, shape
            )
            logit_TE = clean_TE + std_TE * normal_TE
        routing = self.select(logit_TE, gate_scores(logit_TE, self.config), context, shape)
        return replace(routing, noise=Noise(clean_TE, std_TE, raw_TE))
