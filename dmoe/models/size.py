"""How large a model is and how much a token costs, from the shapes of its modules alone.

Letters: S tokens a sequence, H query heads, A width of a head, E experts, K experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from dmoe.models.attention import Attention
from dmoe.moe.experts import Experts
from dmoe.moe.layer import MoE

__all__ = ["Parameters", "flops_per_token", "parameters"]


class Parameters(NamedTuple):
    total: int
    """All weights, every expert counted once wherever it lives."""
    active: int
    """Those one token passes: all but the E-K experts of each MoE layer that it does not choose. Where experts differ, the most that K
    of them have and a budget allows."""
    embedding: int
    """Of both, the token embedding; it is the output projection too if they are tied."""


def parameters(model: nn.Module) -> Parameters:
    """Parameters of a model with MoE layers, any module with an `embedding`."""
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in experts)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    total = dense + sum(sum(layer.experts.multiply_adds) for layer in layers)
    active = dense + sum(_most_active(layer) for layer in layers)
    embedding = getattr(model, "embedding", None)
    return Parameters(total, active, embedding.weight.numel() if isinstance(embedding, nn.Embedding) else 0)


def _most_active(layer: MoE) -> int:
    """Weights of the K largest experts of all ranks, or what the budget buys where that is less: a weight is a multiply-add."""
    work = sorted(layer.experts.multiply_adds, reverse=True)
    largest, config = sum(work[: layer.router.top_k]), layer.router.config
    return min(largest, int(config.budget * sum(work))) if config.kind == "budget" else largest


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Forward FLOPs of the matrix products for one token, two for each multiply-add; backward takes twice as many.

    `2 * (active weights without the embedding table) + 2 * vocabulary * D + 4 * H * A * (S + 1)/2` for each attention: a causal
    token sees (S + 1)/2 others on average (Kaplan et al. 2020 leave the attention out, PaLM counts S; both differ little while
    S << D). Norms, softmax, rotary positions and dropped choices are not subtracted or added.
    """
    count = parameters(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    tied = getattr(model, "output", None) is None  # then the table is multiplied by as well; else it is only looked up
    matrices = count.active - vectors - (0 if tied else count.embedding)
    attended = sum(m.heads * m.head_dim for m in model.modules() if isinstance(m, Attention))
    return 2 * matrices + 2 * attended * (seq_len + 1)
