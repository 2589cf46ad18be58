"""How large a model is and how much a token costs, from the shapes of its modules alone.

Letters: S tokens a sequence, H query heads, A width of a head, E experts, K experts a token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from dmoe.models.attention import Attention
from dmoe.models.fusion import GatedFusion
from dmoe.moe.interfaces import ExpertLayer
from dmoe.moe.layer import MoE


class Parameters(NamedTuple):
    total: int
    """All weights, every expert counted once wherever it lives."""
    active: int
    """Those one token (one sample, of a table) passes: all but the E-K experts of each MoE layer that it does not choose. Where
    experts differ, the most that K of them have and a budget allows. Encoders of streams: all."""
    trained: int
    """Of `total`, those that are not frozen."""
    embedding: int
    """Of `total` and `active`, the token embedding; it is the output projection too if they are tied."""


def parameters(model: nn.Module) -> Parameters:
    """Parameters of a model with MoE layers, any module with an `embedding`, with or without modules attached."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    banks = [
        module
        for module in model.modules()
        if isinstance(module, ExpertLayer) and not isinstance(module, MoE)
    ]
    stacks: list[nn.Module] = [
        *(layer.experts for layer in layers),
        *(layer.experts for layer in banks),
    ]
    experts = {id(p) for stack in stacks for p in stack.parameters()}
    rest = [p for p in model.parameters() if id(p) not in experts]
    modules = {layer: _all_modules(layer) for layer in banks}
    dense = sum(p.numel() for p in rest)
    total = (
        dense + sum(modules.values()) + sum(sum(layer.experts.multiply_adds) for layer in layers)
    )
    encoders = {module.encoders for module in model.modules() if isinstance(module, GatedFusion)}
    active = dense + sum(
        sum(layer.experts.multiply_adds) if layer in encoders else _most_active(layer)
        for layer in layers
    )
    active += sum(
        size * layer.router.top_k // layer.router.num_experts for layer, size in modules.items()
    )
    trained = sum(p.numel() for p in rest if p.requires_grad) + sum(
        n for layer, n in modules.items() if _trained(layer.experts)
    )
    trained += sum(sum(layer.experts.multiply_adds) for layer in layers if _trained(layer.experts))
    embedding = getattr(model, "embedding", None)
    return Parameters(
        total,
        active,
        trained,
        embedding.weight.numel() if isinstance(embedding, nn.Embedding) else 0,
    )


def _all_modules(bank: ExpertLayer) -> int:
    """Weights of a bank of modules, over all ranks: each of its parameters is a stack of the modules of this one."""
    return sum(p.numel() // len(p) * bank.router.num_experts for p in bank.experts.parameters())


def _trained(experts: nn.Module) -> bool:
    """Of the experts of one layer all are trained or none."""
    return any(p.requires_grad for p in experts.parameters())


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
    tied = (
        getattr(model, "output", None) is None
    )  # then the table is multiplied by as well; else it is only looked up
    matrices = count.active - vectors - (0 if tied else count.embedding)
    attended = sum(m.heads * m.head_dim for m in model.modules() if isinstance(m, Attention))
    return 2 * matrices + 2 * attended * (seq_len + 1)
