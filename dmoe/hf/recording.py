"""Notes of each forward of a moefied model: hooks of the model and of the model inside it.

A causal language model of transformers holds a base model (`model.model`), which trainers with a
loss of their own call alone. Either begins a record, and the one that began it ends it.

Letters: B sequences, S positions, T = B*S tokens.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.hf.layer import Forward, MoefiedLayer
from dmoe.hf.pooled_loss import add_pooled
from dmoe.moe.load_balancing import coefficients
from dmoe.moe.routing import TokenContext

RECORD = "dmoe_forward"
"""Attribute of both models that has their `Forward`."""
RECOMPUTE = "_gradient_checkpointing_func"
"""Attribute by which transformers recomputes a module."""
IGNORED = -100
"""Label of a position that is not predicted, in transformers."""


def record_forwards(model: nn.Module, record: Forward) -> None:
    """Let a moefied model, and the base model inside it, begin and end `record`."""
    inner = getattr(model, "base_model", model)
    for each in dict.fromkeys((model, inner if isinstance(inner, nn.Module) else model)):
        each.__dict__[RECORD] = record
        each.register_forward_pre_hook(_begin, with_kwargs=True)
        each.register_forward_hook(_end, with_kwargs=True, always_call=True)


def weighted_losses(layers: list[MoefiedLayer], record: Forward) -> Tensor:
    """Return the weighted sum of the auxiliary losses of a forward, over all layers."""
    total = record.layers[0].routing.logit_TE.new_zeros(())
    for layer in record.layers:
        for name, coefficient in coefficients(layers[0].balance).items():
            total = total + coefficient * layer.aux[name]
    return total


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Start the record of a forward: sequences and padding of its tokens."""
    record: Forward = model.__dict__[RECORD]
    if record.running:  # the caller has begun it, with a context of its own
        return
    given = _arguments(model, args, kwargs)
    _keep_contexts(model, record)
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor):
        record.begin(TokenContext(), 1, model)
        return
    batch, length = tokens.shape[:2]
    mask = given.get("attention_mask")
    valid_T = None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        valid_T = mask[:, -length:].flatten() != 0
    record.begin(TokenContext(valid_T=valid_T), batch, model)


def _end(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """End the record, and add the auxiliary losses to the output's loss in training."""
    record: Forward = model.__dict__[RECORD]
    if record.begun_by != type(model).__name__:  # the base model, in the whole one
        return output
    record.running = False
    layers = [module for module in model.modules() if isinstance(module, MoefiedLayer)]
    add_pooled(layers, record)
    if not (model.training and record.layers):
        return output
    given = _arguments(model, args, kwargs)
    if isinstance(output, tuple) and given.get("labels") is not None:  # return_dict=False
        return (output[0] + _share(layers, record, given).to(output[0].dtype), *output[1:])
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        output["loss"] = loss + _share(layers, record, given).to(loss.dtype)
    return output


def _share(layers: list[MoefiedLayer], record: Forward, given: dict[str, Any]) -> Tensor:
    """Return the auxiliary losses as a part of the output's loss.

    With `num_items_in_batch` transformers divides the sum over this forward's targets by those of
    all accumulated forwards. The auxiliary losses, which are means, get the same share: added whole
    by each of N forwards, they would count N times.
    """
    total, items = weighted_losses(layers, record), given.get("num_items_in_batch")
    if items is None:
        return total
    labels, shifted = given.get("labels"), given.get("shift_labels")
    targets = shifted if shifted is not None else labels[..., 1:] if labels is not None else None
    if targets is None:
        return total
    share: Tensor = total * ((targets != IGNORED).sum() / items)
    return share


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward by name."""
    return dict(zip(signature(model.forward).parameters, args, strict=False)) | kwargs


def _keep_contexts(model: nn.Module, record: Forward) -> None:
    """Let modules that transformers recomputes do so with the record of their own forward.

    The backward may come after another forward, whose padding and sequences are others.
    """
    for module in model.modules():
        again = vars(module).get(RECOMPUTE)
        if not (isinstance(again, partial) and again.func is checkpoint):
            continue
        if again.keywords.get("use_reentrant", True) or "context_fn" in again.keywords:
            continue
        setattr(module, RECOMPUTE, partial(again, context_fn=record.contexts))
