"""`model.source`: the shape of a published model, and the config fields that follow from it.

The directory is one that `save_pretrained` of transformers writes. Its `config.json` gives width,
depth, heads and experts; they are written into the run's resolved.yaml, and a value of the user's
own that contradicts them is refused. Reading it imports transformers, and so torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import get, put
from dmoe.config.schema import Config
from dmoe.config.transformers_log import quiet

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
INSTALL = "pip install 'dmoe[models]'"
FIELD_NAMES = {
    "model.dim": ("hidden_size",),
    "model.layers": ("num_hidden_layers",),
    "model.heads": ("num_attention_heads",),
    "moe.num_experts": (
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "moe_num_experts",
    ),
    "moe.top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
    ),
    "moe.expert_dim": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}
"""Fields that come from the source, and their names in the configs of transformers."""
FIX = "give a model of the table in docs/models.md"
TOKENIZER = "tokenizer.json"
DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Quantisations that transformers can undo, and its class for each."""

READS_IMAGES = "reads images or sound, and transformers has no causal language model of it"
ENCODER_DECODER = "is an encoder with a decoder, and no causal language model"
REFUSED = {
    "dbrx": "has the experts of a layer in matrices without a dimension for the experts",
    "deepseek_ocr2": READS_IMAGES,
    "diffusion_gemma": "writes blocks of tokens by diffusion, and is no causal language model",
    "doge": "has experts of one row each, chosen by product keys: there is nothing to dispatch",
    "ernie4_5_vl_moe": READS_IMAGES,
    "glm4v_moe": READS_IMAGES,
    "glm5_next": READS_IMAGES,
    "jetmoe": "has experts in its attention too, and no module that holds those of a layer",
    "mistral_large4": READS_IMAGES,
    "muse_spark": READS_IMAGES,
    "nllb-moe": ENCODER_DECODER,
    "openai_privacy_filter": "classifies tokens, and is no causal language model",
    "qwen3_omni_moe": READS_IMAGES,
    "qwen3_vl_moe": READS_IMAGES,
    "step3p7": READS_IMAGES,
    "switch_transformers": ENCODER_DECODER,
    "unlimited_ocr": READS_IMAGES,
    "vitpose_backbone": "finds poses in images, and is no causal language model",
}
"""Mixtures of transformers that dmoe does not train, by `model_type`, and why.

Of those that read images, `dmoe.moefy` takes a live model."""


@dataclass(frozen=True)
class PublishedShape:
    """Settings that dmoe's config takes from a published model."""

    fields: dict[str, int]
    """Value of each field of FIELD_NAMES."""
    vocab_size: int
    tokenizer: str | None
    """Path of its tokenizer.json; None without one."""


def source_directory(source: str) -> Path:
    """Return the directory of a source: itself, or the local copy of a name on the hub.

    Raises:
        ConfigError: it is neither, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists() or not HUB_NAME.fullmatch(source):
        allowed = "must be the directory of a published model (config.json and *.safetensors)"
        raise ConfigError("model.source", source, allowed, "check the path")
    return _download(source, None)


def read_shape(source: str) -> PublishedShape:
    """Read the shape of a published model.

    Raises:
        ConfigError: no model of transformers, none with experts, one of `REFUSED`, or transformers
            is missing.
    """
    config = read_config(source)
    if (why := REFUSED.get(config.model_type)) is not None:
        raise ConfigError("model.source", source, f"is a {config.model_type}, which {why}", FIX)
    text = config.get_text_config()
    fields = {}
    for field, names in FIELD_NAMES.items():
        found = (_number(getattr(text, name, None)) for name in names)
        value = next((number for number in found if number is not None), None)
        if value is None:
            allowed = f"is a {config.model_type}, whose config gives no {names[0]}"
            raise ConfigError("model.source", source, allowed, "give a mixture-of-experts model")
        fields[field] = value
    tokenizer = source_file(source, TOKENIZER)
    path = None if tokenizer is None else str(tokenizer)
    return PublishedShape(fields, int(text.vocab_size), path)


def read_config(source: str) -> Any:
    """Return the config of a published model, as transformers reads it. Runs no code of its own.

    Raises:
        ConfigError: there is no config.json that this version of transformers knows.
    """
    try:
        import transformers
    except ImportError:
        allowed = "needs the library transformers, which is not installed"
        raise ConfigError("model.source", source, allowed, f"run {INSTALL}") from None
    file = source_file(source, "config.json")
    if file is None:
        allowed = "has no config.json"
        raise ConfigError("model.source", source, allowed, "name a directory of save_pretrained")
    try:
        with quiet():  # it warns of the same field at each reading
            return transformers.AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        allowed = f"is no model that transformers {transformers.__version__} knows: {said}"
        raise ConfigError("model.source", source, allowed, "check config.json") from None


def quantization_of(source: str) -> str | None:
    """Return the method by which the files are quantised, or None.

    Raises:
        ConfigError: one that cannot be undone.
    """
    settings = getattr(read_config(source), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    method = str(method or getattr(settings, "quant_method", None))
    if method not in DEQUANTIZED:
        allowed = f"is quantised by {method}, which cannot be trained; dmoe undoes fp8 and mxfp4"
        raise ConfigError("model.source", source, allowed, "use the unquantised model")
    return method


def source_file(source: str, name: str) -> Path | None:
    """Return a file of a published model, or None."""
    path = Path(source).expanduser()
    if path.exists() or not HUB_NAME.fullmatch(source):
        file = source_directory(source) / name
        return file if file.is_file() else None
    return _download(source, name)


def with_source(config: Config, given: Collection[str] | None = None) -> Config:
    """Return the config with the fields that follow from `model.source`.

    Args:
        config: the whole config.
        given: names of the fields that the user has set; None: those that are not the default.

    Raises:
        ConfigError: a field that was set to another value than the source's.
    """
    source = config.model.source
    if source is None or (given is not None and {*FIELD_NAMES, "data.tokenizer"} <= {*given}):
        return config
    shape, default = read_shape(source), Config()
    resolved = all(get(config, field) == value for field, value in shape.fields.items())
    if given is None and resolved:
        return config
    for field, value in shape.fields.items():
        own = get(config, field)
        is_given = own != get(default, field) if given is None else field in given
        if is_given and own != value:
            raise contradiction(field, own, value, source)
        config = put(config, field, value)
    own_tokenizer = "data.tokenizer" in given if given is not None else False
    if config.data.tokenizer == default.data.tokenizer and not own_tokenizer:
        if shape.tokenizer is None:
            allowed = f"is that of model.source={source}, which has no {TOKENIZER}"
            fix = "set data.tokenizer to the file of its tokenizer"
            raise ConfigError("data.tokenizer", None, allowed, fix)
        config = put(config, "data.tokenizer", shape.tokenizer)
    if Path(source).expanduser().is_dir():
        absolute = str(source_directory(source))
        config = replace(config, model=replace(config.model, source=absolute))
    return config


def contradiction(field: str, own: object, value: object, source: str) -> ConfigError:
    """Return the error for a field that is not what the source has."""
    allowed = f"is {value} in model.source={source}"
    return ConfigError(field, own, allowed, "leave it out")


def _number(value: object) -> int | None:
    """Return a positive integer; of a list of equal ones, one per layer, the first."""
    if isinstance(value, list) and value and len({*value}) == 1:
        value = value[0]
    return value if type(value) is int and value > 0 else None


def _download(source: str, name: str | None) -> Path:
    """Return the local copy of a model on the hub, or of one of its files."""
    try:
        import huggingface_hub
    except ImportError:
        allowed = "is no directory here, and to fetch it needs transformers"
        raise ConfigError("model.source", source, allowed, f"run {INSTALL}") from None
    log: Any = huggingface_hub.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()  # of each of its tries, before the sentence below
    try:
        if name is None:
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
        return Path(huggingface_hub.hf_hub_download(source, name))
    except Exception as error:
        kind = type(error).__name__
        if name == TOKENIZER and "EntryNotFound" in kind and not kind.startswith("Local"):
            return None  # type: ignore[return-value]
        allowed = f"is no directory here, and not to be had from the hub ({kind})"
        fix = "download it where there is a network, and name its directory"
        raise ConfigError("model.source", source, allowed, fix) from None
    finally:
        log.set_verbosity(level)
