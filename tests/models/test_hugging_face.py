"""Logits and gradients equal those of transformers with the same weights, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from dmoe.config.schema import BalanceConfig, MoEConfig
from dmoe.models.attention import rotary_table
from dmoe.models.transformer import Transformer
from tests.models.hugging_face import everything_in_float64, hugging_face_names
from tests.models.small import MOE, VOCAB, batch, small

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attn_implementation": "eager",
    "experts_implementation": "eager",  # the default, grouped_mm, refuses float64
}
NO_LOSSES = replace(MOE, balance=BalanceConfig(switch=0.0, z=0.0))


def mixtral() -> tuple[nn.Module, Transformer, str]:
    config = transformers.MixtralConfig(
        **SHAPE, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config), small(NO_LOSSES, qk_norm=False), "mlp.experts"


def qwen3_moe() -> tuple[nn.Module, Transformer, str]:
    config = transformers.Qwen3MoeConfig(
        **SHAPE,
        head_dim=6,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        norm_topk_prob=True,
    )
    return (
        transformers.Qwen3MoeForCausalLM(config),
        small(NO_LOSSES, qk_norm=True, head_dim=6),
        "mlp.experts",
    )


def llama() -> tuple[nn.Module, Transformer, str]:
    config = transformers.LlamaConfig(**SHAPE, intermediate_size=24)
    return (
        transformers.LlamaForCausalLM(config),
        small(MoEConfig(), qk_norm=False, moe_every=0, dense_dim=24),
        "",
    )


@pytest.mark.parametrize("pair", [mixtral, qwen3_moe, llama])
def test_logits_and_gradients_equal_transformers(pair):
    token, target = batch()
    with everything_in_float64():
        theirs, ours, experts = pair()
        theirs = theirs.double()
        with torch.no_grad():  # norms away from 1, so that their place in the formula matters
            for name, p in ours.named_parameters():
                if p.dim() == 1:
                    p.copy_(1 + 0.1 * torch.arange(len(p)) / len(p) + 0.01 * len(name))
        missing, extra = theirs.load_state_dict(
            hugging_face_names(ours, lambda p: p.detach(), experts), strict=False
        )
        assert not extra
        assert not missing
        expected = theirs(token).logits
        nn.functional.cross_entropy(
            expected.flatten(0, 1), target.flatten(), reduction="sum"
        ).backward()

    out = ours(token, target, return_logits=True)
    out.loss_sum.backward()
    torch.testing.assert_close(out.logits, expected, rtol=1e-9, atol=1e-9)
    gradients = hugging_face_names(ours, lambda p: p.grad, experts)
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name],
            p.grad,
            rtol=1e-9,
            atol=1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_rotary_table_equals_transformers():
    theirs, _, _ = mixtral()
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), torch.arange(64).unsqueeze(0))
    ours = rotary_table(64, 4, 10000.0, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(ours[0][:, 0], cos[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1][:, 0].abs(), sin[0].abs(), rtol=0, atol=1e-5)
