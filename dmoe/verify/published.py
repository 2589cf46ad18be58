"""`dmoe verify` of a published model: a narrow one of its family, and what its layers did.

The narrow model has the kinds of everything that the source has: attention, router, experts, dense
and sparse layers. Its weights are random, and the case's ranks read them from files as a run does.

transformers computes norms, rotary angles and many routers in float32, whatever the model's dtype.
So a batch of half the size would differ by rounding of float32. While a model runs here,
`torch.float32` means float64.

Letters: L layers, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.published import FIELD_NAMES, read_config, with_source
from dmoe.config.schema import Config, ModelConfig
from dmoe.config.transformers_log import quiet
from dmoe.hf.layer import LayerRecord, MoefiedLayer
from dmoe.hf.model import REENTRANT_FREE, PublishedModel, causal_classes, from_config
from dmoe.hf.moefy import forward_of
from dmoe.models.base import Model
from dmoe.moe.rng import generator
from dmoe.verify.arrays import as_array, computed_experts

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "intermediate_size_mlp": 24,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 256,
}
"""Fields of the configs of transformers, and their value in the narrow model."""
VOCAB_SIZE, MAX_EXPERTS, MAX_LAYERS = 256, 8, 6
WEIGHT_STD = 0.2
"""With smaller weights, narrow layers would route all tokens alike."""


def check(config: Config, dtype: str) -> None:
    """Refuse float32 for a published model. Raises ConfigError.

    Rounding may change a choice in float32; telling it from an error needs dmoe's own router.
    """
    if config.model.source is not None and dtype != "float64":
        why = "cannot tell rounding from an error where a published model's router chooses"
        raise ConfigError("--dtype", dtype, why, "use float64")


def shrink(config: Config, folder: Path) -> Config:
    """Return the config with a narrow random model of the same family, written to `folder`.

    Without `model.source`, the config as it is.
    """
    if config.model.source is None:
        return config
    settings = narrow(read_config(config.model.source))
    auto = causal_classes(settings, config.model.source)
    model: Any = from_config(auto, settings, config.model.source).to(torch.float64)
    randomize(model)
    with quiet():
        model.save_pretrained(folder)
    defaults = ModelConfig(source=str(folder))
    data = replace(config.data, tokenizer="bytes", tokenizer_vocab=None)
    return with_source(replace(config, model=defaults, data=data), {"data.tokenizer"})


def narrow(settings: Any) -> Any:
    """Return a narrow config of the same family: fewer layers, widths and experts, equal kinds."""
    text = settings.get_text_config()
    kept = _kept_layers(text)
    total, heads = text.num_hidden_layers, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(text, name, [value[layer] for layer in kept])
        elif name in WIDTHS and isinstance(value, int) and value:
            setattr(text, name, WIDTHS[name])
    if getattr(text, "q_lora_rank", None):
        text.q_lora_rank = 16
    if kv_heads is not None:
        text.num_key_value_heads = max(1, 4 * kv_heads // heads)
    if getattr(text, "num_kv_shared_layers", 0):
        text.num_kv_shared_layers = 0
    if getattr(text, "first_k_dense_replace", 0):
        text.first_k_dense_replace = 1
    if getattr(text, "num_dense_layers", 0):
        text.num_dense_layers = 1
    text.num_hidden_layers, text.vocab_size = len(kept), VOCAB_SIZE
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    _narrow_experts(text)
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    text._experts_implementation = "eager"
    return text


def _kept_layers(text: Any) -> list[int]:
    """Return the first layer of each kind, in order; two of the last kind, if it is alone."""
    total = text.num_hidden_layers
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == total]
    dense = getattr(text, "first_k_dense_replace", 0) or getattr(text, "num_dense_layers", 0) or 0
    kinds: dict[tuple[Any, ...], int] = {}
    for layer in range(total):
        kinds.setdefault((layer < dense, *(str(v[layer]) for v in lists)), layer)
    kept = sorted(kinds.values())[:MAX_LAYERS]
    while len(kept) < min(2, total):
        kept.append(kept[-1] + 1)
    return kept


def _narrow_experts(text: Any) -> None:
    names = FIELD_NAMES["moe.num_experts"]
    own = [v for n in names if isinstance(v := getattr(text, n, None), int)]
    experts = min([MAX_EXPERTS, *own])
    groups = getattr(text, "n_group", None) or 1
    for name in names:
        if name in vars(text):
            setattr(text, name, experts)
    reach = experts
    if groups > 1:
        text.n_group, text.topk_group = 2, 1
        reach = experts // 2
    for name in FIELD_NAMES["moe.top_k"]:
        value = vars(text).get(name)
        if isinstance(value, int):
            setattr(text, name, min(value, 2, reach))
        elif isinstance(value, list):
            setattr(text, name, [min(value[0], 2, reach)] * text.num_hidden_layers)


def randomize(model: nn.Module) -> None:
    """Draw all weights, biases of choices and tables of choices, each from its name; norms stay.

    transformers makes a table (`tid2eid` of DeepSeek-V4: token id to K experts) of zeros, which is
    one expert K times. Files have K different ones in each row.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        is_bias = "bias" in name and value.is_floating_point()
        if name.endswith("tid2eid"):
            router: Any = model.get_submodule(name.rpartition(".")[0])
            shape = len(value), router.num_experts
            drawn = torch.rand(shape, generator=generator("verify", name))
            value.copy_(drawn.argsort(1)[:, : value.shape[1]])
        elif is_bias or (isinstance(value, nn.Parameter) and value.ndim > 1):
            drawn = torch.randn(value.shape, generator=generator("verify", name))
            value.data.copy_((0.1 if is_bias else WEIGHT_STD) * drawn)


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Let `torch.float32` mean float64 in what transformers computes inside."""
    with (
        patch.multiple(torch, float32=torch.float64, float=torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def compute_in_float64(model: Model) -> None:
    """Run the model with `float32_is_float64`, if it is a published one of float64."""
    if not isinstance(model, PublishedModel) or model.embedding.weight.dtype != torch.float64:
        return
    if model.recompute == "block":
        contexts = {"context_fn": lambda: (float32_is_float64(), float32_is_float64())}
        with quiet():
            model.hf.gradient_checkpointing_enable(REENTRANT_FREE | contexts)
    original = model.hf.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with float32_is_float64():
            return original(*args, **kwargs)

    model.hf.forward = forward


@contextmanager
def record_layers(model: PublishedModel, found: dict[str, Any], step: int) -> Iterator[None]:
    """Record what the MoE layers of a published model do; keys as in `decisions.record_layers`.

    Inputs and outputs are those of the experts: router and shared experts are transformers' own.
    """
    accumulation, seen = [-1], set[int]()

    def begin(module: object, inputs: object) -> None:
        accumulation[0] += 1
        seen.clear()

    def own_input(experts: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # the block's router and shared experts read the same tensor: its gradient is their sum
        return inputs[0].view_as(inputs[0]), *inputs[1:]

    def record(n: int, experts: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        key = f"{step}/{accumulation[0]}/{n}"
        if n in seen:  # a recomputation
            return
        seen.add(n)
        found[f"x/{key}"] = as_array(inputs[0].flatten(0, -2))
        found[f"y/{key}"] = as_array(output.flatten(0, -2))
        for name, tensor in (("dx", inputs[0]), ("dy", output)):
            if tensor.requires_grad:
                tensor.register_hook(partial(_store, found, f"{name}/{key}"))

    def end(module: object, inputs: object, output: object) -> None:
        for n, layer in enumerate(forward_of(model.hf).layers):
            key = f"{step}/{accumulation[0]}/{n}"
            found.update({f"{name}/{key}": array for name, array in layer_arrays(layer).items()})

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(begin).remove)
        stack.callback(model.register_forward_hook(end).remove)
        for n, layer in enumerate(layers_of(model)):
            hook: Any = partial(record, n)
            stack.callback(layer.experts.register_forward_pre_hook(own_input).remove)
            stack.callback(layer.experts.register_forward_hook(hook).remove)
        yield


def layers_of(model: Model) -> list[MoefiedLayer]:
    """Return the MoE layers of a published model."""
    return [layer for layer in model.moe_layers() if isinstance(layer, MoefiedLayer)]


def layer_arrays(record: LayerRecord) -> dict[str, Any]:
    """Return choice, survivors, weights, scores and slots of one forward of a layer."""
    plan = record.plan
    weight_TE = plan.weight_TK.new_zeros(len(plan.expert_TK), plan.num_experts)
    kept_TK = plan.weight_TK.detach().masked_fill(~plan.is_kept_TK, 0.0)
    return {
        "chosen": computed_experts(record.routing),
        "computed": computed_experts(plan),
        "weight": as_array(weight_TE.scatter_add_(1, plan.expert_TK, kept_TK)),
        "score": as_array(record.routing.score_TE),
        "slots": np.array(record.stats.slots, np.float64),
    }


def _store(found: dict[str, Any], name: str, gradient: Tensor) -> None:
    found[name] = as_array(gradient.flatten(0, -2))
