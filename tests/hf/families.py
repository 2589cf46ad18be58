"""Tiny random models of the published families, built by transformers from configs."""

from __future__ import annotations

from pathlib import Path
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
MLAQ = {**MLA, "q_lora_rank": 16}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
SIGMOID = {**ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
LINEAR = {
    "shared_expert_intermediate_size": 24,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
INDEXER = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
"""Of sparse attention: the best of 16 positions."""
SECOND, BOTH = ({"mlp_layer_types": [first, "sparse"]} for first in ("dense", "sparse"))
"""Which of the two layers are mixtures."""
GROUPED = {**SIGMOID, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
KIMI = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "partial_rotary_factor": 1.0,
    "llama_4_scaling_beta": 0.1,
}

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
    "qwen3_next": {**EXPERTS, **LINEAR},
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
        **SLIDING,
    },
    "laguna": {
        **EXPERTS,
        "shared_expert_intermediate_size": 24,
        **SLIDING,
        **BOTH,
        "num_attention_heads_per_layer": [4, 4],
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
        **SLIDING,
    },
    "longcat_flash": {
        **MLAQ,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 24,
        "ffn_hidden_size": 24,
    },
    "zaya": {"num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 16},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**MLAQ, **GROUPED, **SECOND},
    "axk2": {**MLAQ, **GROUPED, **SECOND, **INDEXER, "gated_norm_rank": 4},
    "bailing_hybrid": {
        **MLAQ,
        **KIMI,
        **SECOND,
        "short_conv_kernel_size": 2,
        "layer_types": LINEAR["layer_types"],
        "num_mtp_layers": 0,
    },
    "beam": {**EXPERTS, **SLIDING, **BOTH, "n_group": 2, "topk_group": 1},
    "cohere2_moe": {**EXPERTS, **SLIDING, **BOTH, "num_shared_experts": 1},
    "deepseek_v32": {**MLAQ, **GROUPED, **INDEXER, **SECOND, "head_dim": 8},
    "deepseek_v4": {
        **ROUTED,
        **INDEXER,
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4},
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "sliding_window": 8,
    },
    "dots3_note_text": {
        **MLAQ,
        **GROUPED,
        **INDEXER,
        **SECOND,
        "head_dim": 16,
        "shared_experts_intermediate_size": 24,
    },
    "exaone_moe": {**EXPERTS, **SLIDING, **SECOND, "n_group": 2, "topk_group": 1},
    "flint": {
        **EXPERTS,
        **SLIDING,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "glm4_moe_lite": {**MLAQ, **GROUPED, **SECOND},
    "glm_moe_dsa": {**MLAQ, **GROUPED, **INDEXER, **SECOND, "head_dim": 8},
    "granitemoe_swa": {**LOCAL, **SLIDING, "shared_intermediate_size": 24},
    "granitemoehybrid": {
        **LOCAL,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 4,
        "mamba_chunk_size": 8,
    },
    "hy_v3": {**EXPERTS, **SECOND},
    "hy_v4": {**MLAQ, **GROUPED, **SECOND},
    "inkling_text": ROUTED,
    "inkling2_text": ROUTED,
    "kimi_linear": {
        **MLAQ,
        **KIMI,
        **SECOND,
        "layer_types": LINEAR["layer_types"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {**EXPERTS, **SLIDING, "shared_expert_intermediate_size": 24},
    "mellum": {**EXPERTS, **SLIDING, **BOTH},
    "mimo_v2_flash": {
        **ROUTED,
        **SLIDING,
        **SECOND,
        "n_group": 2,
        "topk_group": 1,
        "v_head_dim": 8,
    },
    "minimax": {**LOCAL, "block_size": 8},
    "minimax_m3_vl_text": {
        **LOCAL,
        **SECOND,
        "dense_intermediate_size": 24,
        "shared_intermediate_size": 24,
        "rotary_dim": 4,
    },
    "mistral4": {**MLAQ, **GROUPED, "first_k_dense_replace": 0, "rope_parameters": YARN},
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR},
    "qwen4_exp_text": {
        **EXPERTS,
        **LINEAR,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "solar_open": ROUTED,
}
"""By `model_type`: the fields of its config besides SHAPE."""
SAMPLED = frozenset({"phimoe"})
"""Families whose router draws random numbers in training: compared in evaluation mode."""


def tiny(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """Build the model of a family with random weights; a function of its config alone."""
    import transformers

    from dmoe.hf.model import causal_classes

    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **more})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = causal_classes(config, family).from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if "bias" in name and parameter.is_floating_point():
            # biases of zero would hide that one is left out
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.ndim > 1 and isinstance(parameter, nn.Parameter):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("tid2eid"):  # the choice of a token id: zeros would be one expert twice
            first = torch.randint(8, (len(parameter), 1), generator=generator)
            parameter.copy_((first + torch.arange(parameter.shape[1])) % 8)
    model.train(family not in SAMPLED)
    return model


def read(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Read a model of a directory with transformers alone."""
    from dmoe.config.published import read_config
    from dmoe.hf.model import causal_classes

    auto = causal_classes(read_config(str(folder)), str(folder))
    return auto.from_pretrained(folder, dtype=dtype, **more)
