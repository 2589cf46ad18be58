"""Small models and batches the tests of this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.models.base import ModelOutput
from dmoe.models.transformer import Transformer

VOCAB = 37
MODEL = ModelConfig(dim=16, layers=3, heads=4, kv_heads=2, tie_embeddings=False, init_std=0.2)
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=12)


def small(
    moe: MoEConfig = MOE,
    *,
    seed: int = 1,
    virtual_ranks: int = 1,
    recompute: str | bool = False,
    **model: Any,
) -> Transformer:
    """A float64 model whose weights are large enough to make every path matter."""
    config = ModelConfig(**(vars(MODEL) | model))
    built = Transformer(config, moe, VOCAB, virtual_ranks=virtual_ranks, recompute=recompute)
    built.initialize(seed)
    return built.double()


def batch(sequences: int = 3, length: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and targets, [B, S] both."""
    draws = torch.Generator().manual_seed(seed)
    token, target = torch.randint(VOCAB, (2, sequences, length), generator=draws)
    return token, target


def total_loss(out: ModelOutput, tokens: int) -> Tensor:
    """The number training minimises: mean cross-entropy and weighted auxiliary losses."""
    assert out.loss_sum is not None
    return out.loss_sum / tokens + sum(0.1 * value for aux in out.aux for value in aux.values())


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
