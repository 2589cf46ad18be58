"""dmoe's transformer as a published model: the config.json of the family that it is, and back.

    MoE layers, without QK-norm      Mixtral
    MoE layers, with QK-norm         Qwen3-MoE, whose first or other blocks may be dense
    dense, without QK-norm           Llama (SmolLM, Mistral)
    dense, with QK-norm              Qwen3

These have the same network: pre-norm, rotary positions in halves, grouped queries, gated
feed-forwards. A setting that none of them has is refused by name, in both directions: a file that
loads and computes something else would be found by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.rules import head_dim, moe_blocks
from dmoe.config.schema import Config, MoEConfig
from dmoe.models.layers import dense_hidden_dim

Family = Literal["mixtral", "qwen3_moe", "llama", "qwen3"]
CLASSES: dict[Family, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SAME_AS: dict[str, Family] = {**{name: name for name in CLASSES}, "mistral": "llama"}
"""Model types that can be read."""
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu"}


def family_of(config: Config) -> Family:
    """Return the family that the model of a config is.

    Raises:
        ConfigError: for the first field that no family has.
    """
    for field, value, why, fix in _misfits(config):
        raise ConfigError(field, value, f"{why}, so that the model cannot be exported", fix)
    if config.model.qk_norm:
        return "qwen3_moe" if moe_blocks(config) else "qwen3"
    return "mixtral" if moe_blocks(config) else "llama"


def _misfits(config: Config) -> Iterator[tuple[str, Any, str, str]]:
    """Yield field, value, reason and fix of what no family has."""
    model, moe = config.model, config.moe
    if config.train.task != "language_modelling":
        yield "train.task", config.train.task, "has no published family", "export a language model"
    if model.source is not None:
        yield "model.source", model.source, "is a published model already", "use dmoe.hf.export"
    if config.modular.bank != "none":
        fix = "merge or export the modules (dmoe modules)"
        yield "modular.bank", config.modular.bank, "adds modules that no family has", fix
    if moe.experts.kind not in ACTIVATIONS:
        kinds = " and ".join(ACTIVATIONS)
        kind = label(moe.experts.kind)
        yield "moe.experts.kind", kind, f"is not gated as in every family ({kinds})", "use swiglu"
    if moe_blocks(config):
        yield from _moe_misfits(moe)
        if not model.qk_norm and len(moe_blocks(config)) < model.layers:
            field = "model.dense_first" if model.dense_first else "model.moe_every"
            why = "leaves dense blocks, which Mixtral has not, and Qwen3-MoE has QK-norm"
            yield field, getattr(model, field.split(".")[1]), why, "train with model.qk_norm=true"
        if not model.qk_norm and not _sums_to_one(moe):
            why = "is not Mixtral's, and Qwen3-MoE has QK-norm"
            fix = "train with renormalized weights, or model.qk_norm=true"
            yield "moe.router.renormalize", moe.router.renormalize, why, fix


def _moe_misfits(moe: MoEConfig) -> Iterator[tuple[str, Any, str, str]]:
    router, experts, own = moe.router, moe.experts, "has no place in Mixtral or Qwen3-MoE"
    wanted = {
        "moe.router.kind": (label(router.kind), "top_k"),
        "moe.router.score": (router.score, "softmax"),
        "moe.router.scale": (router.scale, 1.0),
        "moe.balance.bias": (moe.balance.bias, 0.0),
        "moe.capacity.eval_factor": (moe.capacity.eval_factor, None),
        "moe.experts.shapes": (experts.shapes, []),
        **{
            f"moe.experts.{name}": (getattr(experts, name), 0)
            for name in ("shared", "zero", "copy", "constant")
        },
    }
    for field, (value, fits) in wanted.items():
        if value != fits:
            yield field, value, own, f"a run with {field}={'null' if fits is None else fits} has"


def _sums_to_one(moe: MoEConfig) -> bool:
    """Return whether a token's weights sum to 1: the softmax of the chosen, by either name."""
    return moe.router.renormalize or moe.router.weights_from == "chosen"


def published_config(
    config: Config, vocab_size: int, separator: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: of the run.
        vocab_size: rows of the embedding.
        separator: token between documents, which ends a text.
        dtype: of the files.

    Raises:
        ConfigError: for the first field that no family has.
    """
    family, model, moe = family_of(config), config.model, config.moe
    content: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": head_dim(model),
        "hidden_act": ACTIVATIONS[moe.experts.kind],
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "max_position_embeddings": config.data.seq_len,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "vocab_size": vocab_size,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if family == "mixtral":
        return content | {
            "intermediate_size": moe.expert_dim,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.balance.switch,
            "router_jitter_noise": 0.0,
        }
    content["intermediate_size"] = dense_hidden_dim(model, moe)
    if family == "qwen3_moe":
        sparse = moe_blocks(config)
        content |= {
            "moe_intermediate_size": moe.expert_dim,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": _sums_to_one(moe),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n in range(model.layers) if n not in sparse],
            "router_aux_loss_coef": moe.balance.switch,
        }
    return content


@dataclass(frozen=True)
class PublishedModel:
    """What a config.json says of a model that dmoe's transformer is."""

    family: Family
    vocab_size: int
    fields: dict[str, Any]
    """Value of every field of dmoe's config that it decides."""


def read_published(content: Mapping[str, Any], field: str, folder: object) -> PublishedModel:
    """Read a config.json.

    Args:
        content: of the file.
        field: what errors name: the argument.
        folder: its value.

    Raises:
        ConfigError: a family that dmoe's transformer is not, or a setting that it has not.
    """

    def refuse(why: str) -> ConfigError:
        names = ", ".join(SAME_AS)
        fix = f"give a model of one of these types: {names}"
        return ConfigError(field, folder, f"config.json has {why}", fix)

    kind = content.get("model_type")
    if kind not in SAME_AS:
        raise refuse(f"model_type={kind}, which dmoe's own transformer is not")
    family = SAME_AS[kind]
    for name, value in content.items():
        is_count = name.startswith("num_") or name.endswith(("_size", "_dim"))
        if is_count and value is not None and type(value) is not int:
            raise refuse(f"{name}={value!r}, which is no whole number")
    wanted = {"attention_bias": False, "mlp_bias": False, "quantization_config": None}
    for name, fits in wanted.items():
        if content.get(name, fits) not in (fits, None):
            raise refuse(f"{name}={content[name]}, which dmoe's own transformer has not")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise refuse(f"rotary positions of kind {scaling}, and dmoe's transformer has plain ones")
    activation = content.get("hidden_act", "silu")
    if activation not in ACTIVATIONS.values():
        raise refuse(f"hidden_act={activation}, which dmoe's own transformer has not")
    window, positions = content.get("sliding_window"), content.get("max_position_embeddings")
    used = window is not None and content.get("use_sliding_window", True)
    if used and (positions is None or window < positions):
        raise refuse(f"sliding_window={window}, and dmoe's attention sees every earlier token")
    try:
        fields = _fields(content, family, rope)
    except KeyError as missing:
        raise refuse(f"no {missing.args[0]}") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise refuse(f"values of another type than that model's ({error})") from None
    kinds = {name: kind for kind, name in ACTIVATIONS.items()}
    fields["moe.experts.kind"] = kinds[activation]
    return PublishedModel(family, content["vocab_size"], fields)


def _fields(content: Mapping[str, Any], family: Family, rope: Mapping[str, Any]) -> dict[str, Any]:
    heads, width = content["num_attention_heads"], content["hidden_size"]
    own_width = content.get("head_dim") or width // heads
    layers = content["num_hidden_layers"]
    fields: dict[str, Any] = {
        "model.dim": width,
        "model.layers": layers,
        "model.heads": heads,
        "model.kv_heads": content.get("num_key_value_heads") or heads,
        "model.head_dim": own_width,
        "model.qk_norm": family.startswith("qwen3"),
        "model.tie_embeddings": bool(content.get("tie_word_embeddings", False)),
        "model.rope_base": float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
        "model.norm_eps": float(content.get("rms_norm_eps", 1e-6)),
    }
    content["vocab_size"]
    if family in ("llama", "qwen3"):
        return fields | {"model.moe_every": 0, "model.dense_dim": content["intermediate_size"]}
    mixtral = family == "mixtral"
    names = ("num_local_experts", "num_experts")  # transformers 5.23 writes the first for both
    experts = next((content[name] for name in names if name in content), None)
    if experts is None:
        raise KeyError(names[0 if mixtral else 1])
    fields |= {
        "moe.num_experts": experts,
        "moe.top_k": content["num_experts_per_tok"],
        "moe.expert_dim": content["intermediate_size" if mixtral else "moe_intermediate_size"],
        "moe.router.renormalize": mixtral or bool(content.get("norm_topk_prob", False)),
        "model.moe_every": 1,
    }
    if mixtral:
        return fields
    dense, step = set(content.get("mlp_only_layers") or ()), content.get("decoder_sparse_step", 1)
    sparse = [n for n in range(layers) if n not in dense and (n + 1) % step == 0]
    return fields | {"model.dense_dim": content["intermediate_size"]} | _positions(sparse, layers)


def _positions(sparse: list[int], layers: int) -> dict[str, int]:
    """Return `dense_first` and `moe_every` of a list of sparse blocks."""
    for first in range(layers):
        for every in range(1, layers + 1):
            found = [n for n in range(first, layers) if (n - first + 1) % every == 0]
            if found == sparse:
                return {"model.dense_first": first, "model.moe_every": every}
    raise KeyError("regular order of sparse blocks (mlp_only_layers)")
