"""Noisy top-k gating (Shazeer et al. 2017, section 2.1):

    H = x W_g^T + StandardNormal * softplus(x W_noise^T)                                         (eq. 4)
    G = softmax(KeepTopK(H, K)),   KeepTopK sets all but the K largest to minus infinity          (eq. 3, 5)

The noise lets an expert that is nearly good enough be tried, and makes the load differentiable: `Routing.noise` is what the smooth
load loss (appendix A) needs. Evaluation routes by H = x W_g^T. Both matrices learn; W_noise starts at zero, as in the paper:
softplus(0) = 0.69 of noise everywhere. With K = 1 the weight is always 1 and W_g would learn nothing: refused in the config.
The choice is by softmax(H) + bias; without a bias that is the order of H.

Cost beside `learned.py`: a second [T, D] x [D, E] product and T*E normal draws. No collective, no host sync.

Letters: T tokens, D width, E experts, K experts a token.

Random numbers for routing that depend on the sequence they are for, and on nothing else.

Sequence b of a forward draws from the generator keyed by (seed, what, step, layer, index of the sequence in the global batch), so
neither the world size, nor the cut into micro-batches, nor a recomputed activation changes them. Drawn on the tokens' device in
float32 (a copy from the host would wait for it), so CPU and CUDA draw different numbers from the same key.

Letters: T tokens, S tokens a sequence, X numbers a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dmoe.config.schema import RouterConfig
from dmoe.moe.rng import keyed_noise
from dmoe.moe.routers.learned import LearnedRouter, gate_scores, project
from dmoe.moe.routing import Noise, Routing, TokenContext


class NoisyRouter(LearnedRouter):
    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        # Softmax over the kept logits is what `weights_from: chosen` means; it sums to 1 as it is.
        config = replace(config, score="softmax", weights_from="chosen", renormalize=False)
        super().__init__(config, dim, num_experts, top_k, layer)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        super().initialize(seed, layer, std)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        """Raises ValueError in training without `context.noise_key`."""
        x_TD = self.router_input(x_TD, context)
        clean_TE = project(x_TD, self.weight)
        std_TE = softplus(project(x_TD, self.noise_weight))
        logit_TE = clean_TE
        if self.training:
            logit_TE = clean_TE + std_TE * keyed_noise(
                torch.randn, "noise", clean_TE, self.num_experts, self.layer, context
            )
        routing = self.route(logit_TE, gate_scores(logit_TE, self.config), context)
        return replace(routing, noise=Noise(clean_TE, std_TE))


def noisy_reference(
    x: Sequence[float],
    gate: Sequence[Sequence[float]],
    noise_gate: Sequence[Sequence[float]],
    drawn: Sequence[float],
    top_k: int,
) -> tuple[list[int], list[float]]:
    """One token, from the three equations; `drawn` are its E standard normals. For tests."""
    h = []
    for w_g, w_noise, normal in zip(gate, noise_gate, drawn, strict=True):
        clean = sum(a * b for a, b in zip(x, w_g, strict=True))
        std = math.log(1 + math.exp(sum(a * b for a, b in zip(x, w_noise, strict=True))))
        h.append(clean + normal * std)
    kept = sorted(range(len(h)), key=lambda e: (-h[e], e))[:top_k]
    total = sum(math.exp(h[e]) for e in kept)
    return kept, [math.exp(h[e]) / total for e in kept]
