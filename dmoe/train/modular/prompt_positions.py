"""Room for prompts and prefixes: P positions in front of each sequence, which nobody outside the model sees.

The model is handed S tokens a sequence and answers for S positions, in training, in evaluation and in `dmoe generate`; in between it
has P + S of them. What stands in front has no target, the label and the validity of its sequence, and is routed and counted by the
mixture layers like any token: the vectors that the modules put there are real ones. So a run with a prompt does the work of P + S
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.models.base import IGNORE, ModelOutput
from dmoe.models.transformer import Transformer
from dmoe.modular import with_room
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext


def make_room(model: nn.Module, length: int) -> None:
    """From now on every forward of `model` has `length` positions more in front. After `attach`, before the model is wrapped.

    Raises: ConfigError for a model that reads no tokens.
    """
    if not isinstance(model, Transformer):
        allowed = "stands in front of tokens, which this model does not read"
        raise ConfigError(
            "modular.bank", "prompt", allowed, "use low_rank, adapter, scale or sparse_delta"
        )
    # in front of the hooks of `attach`, which are to hear of the longer sequences
    model.register_forward_pre_hook(partial(_longer, length), with_kwargs=True, prepend=True)
    model.register_forward_hook(partial(_shorter, length), with_kwargs=True)


def _longer(
    length: int, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("input", "target", "context")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    sequences = len(given["input"])
    given["input"] = with_room(given["input"], length)
    if given.get("target") is not None:
        given["target"] = with_room(given["target"], length, IGNORE)
    if given.get("context") is not None:
        given["context"] = _context(given["context"], sequences, length)
    return (), given


def _context(context: TokenContext, sequences: int, length: int) -> TokenContext:
    """What holds for the first token of a sequence holds for the positions in front of it."""

    def longer(value_T: Tensor | None) -> Tensor | None:
        if value_T is None:
            return None
        value_BS = value_T.view(sequences, -1)
        return torch.cat([value_BS[:, :1].expand(-1, length), value_BS], 1).flatten()

    return replace(context, label_T=longer(context.label_T), valid_T=longer(context.valid_T))


def _shorter(
    length: int, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: ModelOutput
) -> ModelOutput:
    sequences = len(kwargs["input"])

    def cut(value_TX: Tensor) -> Tensor:
        return value_TX.view(sequences, -1, *value_TX.shape[1:])[:, length:].flatten(0, 1)

    def without(stats: LayerStats) -> LayerStats:
        """What an observer told of each token; sums stay sums over all positions."""
        return replace(
            stats,
            observed={name: cut(v) if "_T" in name else v for name, v in stats.observed.items()},
        )

    return replace(
        output,
        logits=None if output.logits is None else output.logits[:, length:],
        loss_T=None if output.loss_T is None else cut(output.loss_T),
        correct_T=None if output.correct_T is None else cut(output.correct_T),
        stats=[without(stats) for stats in output.stats],
    )
