"""Tiny random models of the published families, built by transformers from configs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
SIGMOID = {**ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
GROUPED = {**SIGMOID, "routed_scaling_factor": 1.5, "norm_topk_prob": True}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "olmoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": EXPERTS,
    "deepseek_v2": {
        **MLA,
        **ROUTED,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**MLA, **GROUPED},
    "gpt_oss": {**LOCAL, "sliding_window": 8},
    "glm4_moe": {**GROUPED, "partial_rotary_factor": 0.5},
    "granitemoe": LOCAL,
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "phimoe": LOCAL,
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "dots1": GROUPED,
    "minimax_m2": {**LOCAL, "rotary_dim": 4},
    "qwen3_next": {
        **EXPERTS,
        "shared_expert_intermediate_size": 24,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "flex_olmo": EXPERTS,
    "lfm2_moe": {
        **EXPERTS,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
        "use_expert_bias": True,
    },
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "afmoe": {
        **EXPERTS,
        "num_shared_experts": 1,
        "num_dense_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "laguna": {
        **EXPERTS,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
        "num_attention_heads_per_layer": [4, 4],
        "sliding_window": 8,
    },
    "nemotron_h": {
        **ROUTED,
        "layers_block_type": ["moe", "attention", "moe"],
        "num_hidden_layers": 3,
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
    },
    "llama4_text": {
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
    },
    "gemma4_text": {
        **EXPERTS,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "longcat_flash": {
        **{**MLA, "q_lora_rank": 16},
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 24,
    },
    "zaya": {"num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""By `model_type`: the fields of its config besides SHAPE."""
SAMPLED = frozenset({"phimoe"})
"""Families whose router draws random numbers in training: compared in evaluation mode."""


def tiny(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """Build the model of a family with random weights; a function of its config alone."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **more})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if "bias" in name and parameter.is_floating_point():
            # biases of zero would hide that one is left out
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.ndim > 1 and isinstance(parameter, nn.Parameter):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.train(family not in SAMPLED)
    return model
