"""A published model as the trainer's `Model`: transformers' own, but for its MoE layers.

Letters: B sequences, S positions, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.published import read_config
from dmoe.config.schema import Config
from dmoe.config.transformers_log import quiet
from dmoe.hf.adapters import trim_identities
from dmoe.hf.load import load_weights
from dmoe.hf.lora import add_lora, initialize_lora
from dmoe.hf.moefy import forward_of, moefied_layers, moefy
from dmoe.models.base import Model, ModelOutput, token_losses
from dmoe.moe.inputs import as_int64, context_of_rows
from dmoe.moe.routing import EMPTY_CONTEXT, TokenContext

REENTRANT_FREE = {"use_reentrant": False}


class PublishedModel(Model):
    """A causal language model of transformers, with dmoe's layers for its MoE blocks.

    The constructor makes all parameters on the meta device: `to_empty` gives them memory, and
    `initialize` fills them from the files of `model.source`, on each rank its own experts only.
    Buffers are made as transformers makes them.

    Args:
        config: whole config, with `model.source`.
        num_outputs: vocabulary size V of the tokenizer, at most that of the model.
        virtual_ranks: as in `dmoe.MoE`.
        recompute: `none` or `block`: keep only the input of each block.
    """

    def __init__(
        self, config: Config, num_outputs: int, virtual_ranks: int = 1, recompute: str = "none"
    ) -> None:
        super().__init__()
        assert config.model.source is not None
        self.source, self.recompute = config.model.source, recompute
        settings = read_config(self.source)
        size = settings.get_text_config().vocab_size
        if num_outputs > size:
            allowed = f"has {num_outputs} tokens, and model.source={self.source} has {size}"
            fix = "use the tokenizer of the source"
            raise ConfigError("data.tokenizer", config.data.tokenizer, allowed, fix)
        self.hf = cast(Any, build_empty(settings, self.source))
        if recompute == "block":
            if not self.hf.supports_gradient_checkpointing:
                allowed = f"is not supported by {type(self.hf).__name__} of transformers"
                raise ConfigError("train.recompute", recompute, allowed, "use none")
            with quiet():  # transformers 5.23 has another name for it, and warns
                self.hf.gradient_checkpointing_enable(REENTRANT_FREE)
        moefy(
            self.hf,
            config.moe.capacity,
            config.moe.balance,
            exchange=config.moe.exchange,
            virtual_ranks=virtual_ranks,
        )
        lora = config.model.lora
        if lora.rank:
            add_lora(self.hf, lora.rank, lora.alpha, lora.targets or None)
        self.train()

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.hf.get_input_embeddings())

    @property
    def output(self) -> nn.Module | None:
        """The output projection; None if it is the embedding."""
        head = self.hf.get_output_embeddings()
        tied = head is None or head.weight is self.embedding.weight
        return None if tied else cast(nn.Module, head)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Give the parameters memory; buffers keep their values."""
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    empty = torch.empty_like(parameter, device=device)
                    kept = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    module.register_parameter(name, kept)
            for name, buffer in module.named_buffers(recurse=False):
                empty = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer
                module._buffers[name] = empty.to(device)
        self.hf.tie_weights()
        return self

    def initialize(self, seed: int) -> None:
        """Read the weights from `model.source`; collective over the ranks that share experts."""
        self.notes = load_weights(self.hf, self.source)
        initialize_lora(self.hf, seed)
        for layer in moefied_layers(self.hf):
            layer.forget_counts()

    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        context: TokenContext | None = None,
        *,
        return_logits: bool = False,
    ) -> ModelOutput:
        """Predict each next token; see `Model.forward`. Positions count from 0 in each sequence."""
        input = as_int64("input", input)
        context = context_of_rows(context or EMPTY_CONTEXT, input.shape)
        record = forward_of(self.hf)
        record.begin(context, len(input), self.hf)
        logits_BSV: Tensor = self.hf(input_ids=input, use_cache=False).logits
        out = ModelOutput(
            None, None, [layer.aux for layer in record.layers], [r.stats for r in record.layers]
        )
        if target is not None:
            out.loss_sum, out.loss_T, out.correct_T = token_losses(
                logits_BSV, target, per_token=not self.training
            )
        if target is None or return_logits:
            out.logits = logits_BSV
        return out

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward FLOPs per token: those of the weights and of full causal attention."""
        text = self.hf.config.get_text_config()
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        attention = 2 * text.num_hidden_layers * width * (seq_len + 1)
        return super().flops_per_token(seq_len) + int(attention)


def build_empty(settings: Any, source: str) -> nn.Module:
    """Build the causal language model of a config, parameters on the meta device.

    Raises:
        ConfigError: transformers has no causal language model for it.
    """
    from accelerate import init_empty_weights

    auto = causal_classes(settings, source)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config  # the weights are read dequantised
    settings._experts_implementation = "eager"  # dmoe computes the experts
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model = from_config(auto, settings, source)
        trim_identities(model)
    return model


def from_config(auto: Any, settings: Any, source: str) -> nn.Module:
    """Return the model that transformers builds from a config: random weights, on this device.

    Args:
        auto: of `causal_classes`.
        settings: the config. Most of its fields are not checked before they are used.
        source: for errors.

    Raises:
        ConfigError: transformers cannot build it, or a share of dropout is none.
    """
    for name, value in vars(settings.get_text_config()).items():
        if "dropout" in name and isinstance(value, int | float) and not 0 <= value <= 1:
            why = f"says {name}={value} in config.json, which must be from 0 to 1"
            raise ConfigError("model.source", source, why, "check config.json")
    try:
        with quiet():
            model: nn.Module = auto.from_config(settings)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        kind = f"{type(settings).__name__} of its config.json"
        why = f"cannot be built by transformers from the {kind}: {type(error).__name__}: {said}"
        raise ConfigError("model.source", source, why, "check config.json") from error
    return model


def causal_classes(settings: Any, source: str) -> Any:
    """Return the `AutoModel` of transformers that has a causal language model for a config.

    Raises:
        ConfigError: none has.
    """
    import transformers

    if type(settings) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM
    auto: Any = transformers.AutoModelForImageTextToText
    kind = auto._model_mapping.get(type(settings), None)
    if kind is not None and kind.__name__.endswith("ForCausalLM"):
        return auto  # transformers 5.23 has Mistral-4 there, which reads no images
    allowed = f"is a {settings.model_type}, of which transformers has no causal language model"
    raise ConfigError("model.source", source, allowed, "give another model")
