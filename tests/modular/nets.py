"""Networks to attach modules to, and modules with random weights, since new ones change nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.models.transformer import Transformer
from dmoe.modular import Adapter, LoRA, Prefix, Prompt, Scale, SparseDelta, adapter_layers
from dmoe.modular.banks.base import AdapterBank
from tests.tiny import VOCAB, tiny

__all__ = ["D", "M", "O", "banks", "drawn", "hugging_face", "mlp", "randomize", "transformer"]

M, D, O = 4, 6, 5  # noqa: E741 (the width out, as everywhere)


def banks(in_dim: int = D, out_dim: int = O) -> dict[str, AdapterBank]:
    """Create one bank of every kind with random weights, float64."""
    made = {
        "low_rank": LoRA(M, in_dim, out_dim, rank=3, alpha=5.0),
        "adapter": Adapter(M, in_dim, out_dim, hidden=3),
        "parallel_adapter": Adapter(
            M, in_dim, out_dim, hidden=3, activation="gelu", input_kind="input"
        ),
        "scale": Scale(M, in_dim, out_dim),
        "sparse_delta": SparseDelta(M, in_dim, out_dim, density=0.3),
        "prompt": Prompt(M, in_dim, out_dim, length=2),
        "prefix": Prefix(M, in_dim, out_dim, length=2, columns=(1, 3)),
    }
    for bank in made.values():
        randomize_bank(bank.double())
    return made


def randomize(model: nn.Module) -> None:
    """Give every parameter of modules, routers and aggregations random values."""
    for layer in adapter_layers(model).values():
        randomize_bank(layer)


def randomize_bank(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, O)).to(dtype)


def transformer(*overrides: str) -> Transformer:
    config = tiny(*overrides)
    return Transformer(config.model, config.moe, VOCAB)


def hugging_face() -> nn.Module:
    """Create a Llama of two tiny layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()
