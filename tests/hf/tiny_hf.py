"""Tiny random models of published families, built from their configs: two layers, 8 experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTH: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8}
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": MOE | {"norm_topk_prob": True},
    "deepseek_v3": MOE | MLA | {"n_shared_experts": 1, "routed_scaling_factor": 2.5},
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 8, "rope_parameters": ROPE},
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Build a model of a family with random weights; the same on every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **WIDTH | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:  # wide enough that choices differ between tokens
            torch.nn.init.normal_(parameter, std=0.3 if "gate.weight" in name else 0.1)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    return model.to(dtype)


def tiny_directory(
    family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> str:
    """Save a tiny model and return its directory."""
    model = tiny(family, dtype, **changes)
    model.save_pretrained(folder)
    return str(folder)


def tokens(batch: int = 4, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Return random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def save_tokenizer(folder: Path | str) -> None:
    """Save a byte-level tokenizer of 259 ids with a chat template: vocab_size=259 fits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
