"""Input composition: the first positions, and what later positions read from them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from dmoe.modular import (
    Prefix,
    Prompt,
    adapter_context,
    adapter_layers,
    attach,
    constant,
    detach,
    routed,
    table,
    with_prefix_tokens,
)
from dmoe.modular.aggregation import Attention, Concat, ParameterMean
from tests.modular.nets import M, hugging_face, randomize, transformer

P = 3
TOKENS = torch.arange(20).view(2, 10)
PREFIXED = with_prefix_tokens(TOKENS, P)


def test_a_prompt_is_what_the_model_computes_for_these_embeddings() -> None:
    """Equals a Hugging Face model that gets the prompt before the tokens' embeddings."""
    model = hugging_face()
    attach(model, "model.embed_tokens", partial(Prompt, 1, length=P), constant(1.0))
    randomize(model)
    got, prompt = (
        model(PREFIXED).logits,
        adapter_layers(model)["model.embed_tokens"].experts.vector[0].detach(),
    )
    detach(model)
    embedded = torch.cat([prompt.expand(2, P, -1), model.model.embed_tokens(TOKENS)], 1)
    torch.testing.assert_close(got, model(inputs_embeds=embedded).logits)


def test_a_prefix_is_a_cache_of_keys_and_values() -> None:
    """Equals a key/value cache that holds the learned prefix, rotated to its positions."""
    from transformers import DynamicCache
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = hugging_face()
    attach(model, "*.[kv]_proj", partial(Prefix, 1, length=P), constant(1.0))
    randomize(model)
    got = model(PREFIXED).logits[:, P:]
    learned = {
        name: layer.experts.vector[0].detach() for name, layer in adapter_layers(model).items()
    }
    detach(model)
    cache, positions = DynamicCache(config=model.config), torch.arange(P).unsqueeze(0)
    for index in range(2):
        keys, values = (
            learned[f"model.layers.{index}.self_attn.{kind}_proj"].expand(2, 1, P, 8)
            for kind in "kv"
        )
        cos, sin = model.model.rotary_emb(keys, positions)
        cache.update(apply_rotary_pos_emb(keys, keys, cos, sin)[1], values.contiguous(), index)
    torch.testing.assert_close(got, model(TOKENS, past_key_values=cache).logits)
    assert (got - model(TOKENS).logits).abs().max() > 1e-2


def test_the_reference_transformer_takes_a_prefix_on_a_part_of_a_projection() -> None:
    """Only keys and values of `w_qkv` are written, after which the placeholders are not read."""
    model = transformer("model.moe_every=0", "model.qk_norm=false")
    dim = model.config.dim
    attach(
        model, "*.w_qkv", partial(Prefix, M, length=P, columns=(dim, 3 * dim)), table([[0], [1]], M)
    )
    randomize(model)
    outputs = []
    for fill in (0, 7):
        with adapter_context(model, label_T=torch.tensor([0, 1])):
            outputs.append(model(with_prefix_tokens(TOKENS, P, fill)).logits[:, P:])
    torch.testing.assert_close(*outputs)
    with adapter_context(model, label_T=torch.tensor([1, 1])):
        other = model(PREFIXED).logits[:, P:]
    torch.testing.assert_close(other[1], outputs[0][1])
    assert (other[0] - outputs[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("aggregation", [None, Concat, Attention, ParameterMean])
def test_a_learned_router_mixes_prompts_by_sequence(aggregation: object) -> None:
    """It reads the mean after the prefix, and gets a gradient."""
    model = hugging_face()
    layer = attach(
        model,
        "model.embed_tokens",
        partial(Prompt, M, length=P),
        routed("top_k", M, 2),
        *([aggregation] if aggregation else []),
    )["model.embed_tokens"]
    randomize(model)
    model(PREFIXED).logits.square().sum().backward()
    assert layer.last_routing.expert_TK.shape == (2, 2)
    assert layer.router.weight.grad.any()
    means = model.model.embed_tokens.weight[TOKENS].mean(1)
    torch.testing.assert_close(layer.last_routing.logit_TE, means @ layer.router.weight.t())
    if aggregation in (None, ParameterMean):
        weight = layer.last_routing.weight_TK
        mixed = torch.stack(
            [
                weight[b] @ layer.experts.vector[layer.last_routing.expert_TK[b]].flatten(1)
                for b in range(2)
            ]
        )
        got: Tensor = model.model.embed_tokens(PREFIXED)
        torch.testing.assert_close(got[:, :P].flatten(1), mixed)
        assert torch.equal(got[:, P:], model.model.embed_tokens.weight[TOKENS])


def test_a_call_without_prefix_tokens_is_refused() -> None:
    model = hugging_face()
    attach(model, "model.embed_tokens", partial(Prompt, 1, length=P), constant(1.0))
    with pytest.raises(ValueError, match="with_prefix_tokens"):
        model(TOKENS[:, :P])
