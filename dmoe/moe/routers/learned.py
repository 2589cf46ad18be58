"""What learned routers share: logits, a bias that only chooses, the choice, the weights.

    logit = x W^T        score = softmax(logit) | sigmoid(logit)        chosen = the K largest of score + bias
    weight = score of the chosen, renormalised, scaled: the bias chooses and never weighs (Wang et al. 2024, DeepSeek-V3)

In training Switch's jitter may multiply the input of the router by uniform noise in [1 - jitter, 1 + jitter] (Fedus et al. 2021, 2.4).
Cost: one [T, D] x [D, E] product and one sort of E numbers a token. No collective, no host sync.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dmoe.config.schema import RouterConfig
from dmoe.moe.rng import keyed_noise, normal_
from dmoe.moe.routers.base import RouterModule, router_dtype, valid_choices, with_next_experts
from dmoe.moe.routing import Routing, TokenContext


class LearnedRouter(RouterModule):
    """Logits from one matrix, and a bias. Subclasses say who is eligible, and how many a token takes.

    Logits, scores and weights are float32 whatever the model's precision (ST-MoE, "selective precision"), float64 in a float64
    model. Ties go to the lower expert id on every device.
    """

    bias_E: Tensor
    """float32 or float64. Saved with the weights, moved by the bias controller once a step, never by the optimizer."""

    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        super().__init__(config, num_experts, top_k, layer)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        normal_(self.weight, std, seed, "router", layer)
        self.bias_E.zero_()

    def router_input(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        """The input as the router sees it: float32 or float64, jittered in training."""
        x_TD = x_TD.to(router_dtype(x_TD))
        if not (self.training and self.config.jitter):
            return x_TD
        uniform_TD = keyed_noise(torch.rand, "jitter", x_TD, x_TD.shape[1], self.layer, context)
        return x_TD * (1 + self.config.jitter * (2 * uniform_TD - 1))

    def logits(self, x_TD: Tensor, context: TokenContext) -> Tensor:
        """float [T, E]."""
        return project(self.router_input(x_TD, context), self.weight)

    def route(
        self,
        logit_TE: Tensor,
        score_TE: Tensor,
        context: TokenContext,
        *,
        eligible_TE: Tensor | None = None,
    ) -> Routing:
        """The K largest of score + bias among the eligible experts (all, if None), of which every token must have K."""
        order_TE = sort_experts(score_TE.detach() + self.bias_E, eligible_TE)
        expert_TK = order_TE[:, : self.top_k]
        weight_TK = combine_weights(logit_TE, score_TE, expert_TK, self.config)
        keep_TK = valid_choices(expert_TK, context)
        routing = Routing(
            expert_TK, weight_TK, score_TE, logit_TE, scale=self.config.scale, keep_TK=keep_TK
        )
        if (
            context.capacity is None
        ):  # without a capacity every choice finds a slot: nobody will ask for a next one
            return routing
        spare_TS = order_TE[:, self.top_k : 2 * self.top_k]
        there_TS = None if eligible_TE is None else eligible_TE.gather(1, spare_TS)
        return with_next_experts(routing, spare_TS, self.config, there_TS=there_TS)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> LearnedRouter:
        """Moves and casts like any module, but the bias stays at least float32: in bf16 a bias of 0.5 swallows steps of 0.001."""
        before_E = self.bias_E
        super()._apply(fn, recurse)
        if router_dtype(self.bias_E) != self.bias_E.dtype:
            self.bias_E = before_E.to(self.bias_E.device)
        return self


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in the dtype of `router_dtype`, whatever autocast says."""
    dtype = router_dtype(x_TD)
    with (
        nullcontext() if x_TD.is_meta else torch.autocast(x_TD.device.type, enabled=False)
    ):  # meta knows no autocast
        return x_TD.to(dtype) @ weight_ED.to(dtype).t()


def gate_scores(logit_TE: Tensor, config: RouterConfig) -> Tensor:
    return logit_TE.softmax(-1) if config.score == "softmax" else logit_TE.sigmoid()


def sort_experts(score_TE: Tensor, eligible_TE: Tensor | None = None) -> Tensor:
    """int64 [T, E]: all experts in descending order of score, ties to the lower id, those that are not eligible last.

    A stable descending sort keeps equal scores in index order on CPU and CUDA; `torch.topk` promises no order among ties.
    """
    if eligible_TE is not None:
        score_TE = score_TE.masked_fill(~eligible_TE, -math.inf)
    return score_TE.sort(dim=-1, descending=True, stable=True).indices


def top_k_stable(score_TE: Tensor, top_k: int) -> Tensor:
    """int64 [T, K]: the K largest of each row in descending order, ties to the lower expert id."""
    return sort_experts(score_TE)[:, :top_k]


def combine_weights(
    logit_TE: Tensor,
    score_TE: Tensor,
    expert_TK: Tensor,
    config: RouterConfig,
    made_TK: Tensor | None = None,
) -> Tensor:
    """Combine weights [T, K] of the chosen experts; zero where `made_TK` (None: everywhere True) says that no choice was made.

    `weights_from: chosen` runs the softmax over the K chosen logits (Megatron's default), otherwise the scores over all E are
    taken as they are; `renormalize` divides by the chosen sum (+1e-20); `scale` multiplies last.
    """
    if config.weights_from == "chosen":
        chosen_TK = logit_TE.gather(1, expert_TK)
        if made_TK is not None:
            chosen_TK = chosen_TK.masked_fill(~made_TK, -math.inf)
        weight_TK = gate_scores(chosen_TK, config)
    else:
        weight_TK = score_TE.gather(1, expert_TK)
        if made_TK is not None:
            weight_TK = weight_TK.masked_fill(~made_TK, 0.0)
    if config.renormalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * config.scale


def top_k_stable_reference(score_TE: Tensor, top_k: int) -> Tensor:
    """`choose`, one token at a time and obviously right. For tests."""
    rows = []
    for row in score_TE.tolist():
        rows.append(sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k])
    return torch.tensor(rows, dtype=torch.int64).view(-1, top_k)


def top_k_reference(
    logits: Sequence[float], bias: Sequence[float], config: RouterConfig, top_k: int
) -> tuple[list[int], list[float]]:
    """One token's experts and weights in plain Python, from the formulas at the top. For tests."""
    exponentials = [math.exp(logit) for logit in logits]
    softmax = [value / sum(exponentials) for value in exponentials]
    scores = (
        softmax if config.score == "softmax" else [1 / (1 + math.exp(-logit)) for logit in logits]
    )
    chosen = sorted(range(len(scores)), key=lambda e: (-(scores[e] + bias[e]), e))[:top_k]
    weights = [scores[e] for e in chosen]
    if config.weights_from == "chosen" and config.score == "softmax":
        weights = [exponentials[e] / sum(exponentials[c] for c in chosen) for e in chosen]
    total = sum(weights) if config.renormalize else 1.0
    return chosen, [weight / total * config.scale for weight in weights]
