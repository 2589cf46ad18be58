"""The learned top-k router: Shazeer et al. 2017, Switch (Fedus et al. 2021), Mixtral, DeepSeek-V3.

Letters: T tokens, D width, E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.schema import RouterConfig
from dmoe.moe.keyed import normal_
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["TopKRouter", "choose", "choose_reference", "router_dtype", "weigh"]


class TopKRouter(nn.Module):
    """`score = softmax|sigmoid(x W)`, experts = the K largest scores, weights = their scores (renormalised, scaled).

    Logits, scores and weights are float32 whatever the model's precision (ST-MoE, "selective precision"), float64 in a float64
    model. No collective, no host sync. Ties go to the lower expert id on every device.
    """

    def __init__(self, config: RouterConfig, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.top_k = config, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        normal_(self.weight, std, seed, "router", layer)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        dtype = router_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TE = x_TD.to(dtype) @ self.weight.to(dtype).t()
        score_TE = score(logit_TE, self.config)
        expert_TK = choose(score_TE.detach(), self.top_k)
        weight_TK = weigh(logit_TE, score_TE, expert_TK, self.config)
        keep_TK = None if context.valid_T is None else context.valid_T.unsqueeze(1).expand_as(expert_TK)
        return Routing(expert_TK, weight_TK, score_TE, logit_TE, scale=self.config.scale, keep_TK=keep_TK)


def router_dtype(x: Tensor) -> torch.dtype:
    """float32 for every model precision but float64, which keeps its own (so that `verify` can compare at 1e-10)."""
    return torch.promote_types(x.dtype, torch.float32)


def score(logit_TE: Tensor, config: RouterConfig) -> Tensor:
    return logit_TE.softmax(-1) if config.score == "softmax" else logit_TE.sigmoid()


def choose(score_TE: Tensor, top_k: int) -> Tensor:
    """int64 [T, K]: the K largest of each row in descending order, ties to the lower expert id.

    A stable descending sort keeps equal scores in index order on CPU and CUDA; `torch.topk` promises no order among ties.
    """
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def choose_reference(score_TE: Tensor, top_k: int) -> Tensor:
    """`choose`, one token at a time and obviously right. For tests."""
    rows = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in score_TE.tolist()]  # type: ignore[misc]
    return torch.tensor(rows, dtype=torch.int64).view(-1, top_k)


def weigh(logit_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, config: RouterConfig) -> Tensor:
    """Combine weights [T, K] of the chosen experts.

    `weights_from: chosen` runs the softmax over the K chosen logits (Megatron's default), otherwise the scores over all E are
    taken as they are; `renormalize` divides by the chosen sum (+1e-20); `scale` multiplies last.
    """
    if config.weights_from == "chosen":
        weight_TK = score(logit_TE.gather(1, expert_TK), config)
    else:
        weight_TK = score_TE.gather(1, expert_TK)
    if config.renormalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * config.scale
