"""Inputs of a layer as a caller may give them: what is cast, what is reshaped, what is refused.

A layer takes tokens [..., D]; masks, ids and labels in the shape of the tokens or as [T]; integers
of any width. Everything else is one sentence with what was given and what is allowed. So are second
derivatives and torch.func's transforms, which a layer does not have.

Letters: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.moe.interfaces import DataParallelComm
    from dmoe.moe.routing import TokenContext


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse the `backward` of a `Function` where it is to be differentiated again.

    What such a backward has saved, or receives from another rank, has no graph: a second derivative
    would miss a part of it without a word. torch's `once_differentiable` notices this only if the
    gradient that comes in has a graph; that of a sum has none, and a penalty on the gradient would
    be a constant.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            allowed = "layers, losses and exchanges of dmoe have no second derivative"
            raise ConfigError("create_graph", True, allowed, "call backward without create_graph")
        return backward(ctx, *grads)

    return checked


def as_int64(name: str, value: Any) -> Tensor:
    """Return integers of any width as int64; refuse anything else, under the name `name`."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool or not _is_integer(value):
        raise ConfigError(name, describe(value), "must be a tensor of integers", "use int64")
    return value.to(torch.int64)


def as_mask(name: str, value: Any) -> Tensor:
    """Return a mask as bool; refuse anything but bool and integers 0 and 1.

    A mask of integers is read on the host once.
    """
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return value
    allowed, fix = "must be bool, or integers 0 and 1", "use bool, True for a real token"
    if not isinstance(value, Tensor) or not _is_integer(value):
        raise ConfigError(name, describe(value), allowed, fix)
    integer: Tensor = value.to(torch.int64)
    if not integer.is_meta and bool(((integer != 0) & (integer != 1)).any()):
        raise ConfigError(name, describe(value), f"{allowed}, and holds others", fix)
    return integer == 1


def as_key(name: str, value: Any) -> tuple[int, int]:
    """Return the key of random numbers; refuse anything but two whole numbers.

    The text of a tensor or of a float would be another key on another device.
    """
    if isinstance(value, tuple | list) and [type(part) for part in value] == [int, int]:
        return (value[0], value[1])
    fix = "use int(), e.g. (0, 0)"
    raise ConfigError(name, repr(value)[:40], "must be two whole numbers, (seed, step)", fix)


CASTS = {
    "noise_key": as_key,
    "valid_T": as_mask,
    "prior_count_LE": as_int64,
    "token_id_T": as_int64,
    "label_T": as_int64,
    "position_T": as_int64,
}
"""The fields of `TokenContext` that are cast where they enter."""


class MaskAgreement:
    """Whether a layer's training forwards have a mask: the same on all ranks and in all steps.

    With a mask, the losses need one all-reduce more. A collate function that makes a mask where
    there is padding only would make the ranks' collectives differ: they wait for each other, or one
    reads the numbers of another. The first forward compares the ranks, later ones cost nothing.
    """

    def __init__(self) -> None:
        self.is_given: bool | None = None

    def check(self, valid_T: Tensor | None, x_TD: Tensor, comm: DataParallelComm) -> None:
        """Refuse a mask on some of several ranks only, or in some steps only.

        One all-reduce at first.

        Raises:
            ConfigError: on every rank in the first forward; later on the rank that changes.
        """
        given = valid_T is not None
        fix = "pass one on every rank in every step, all True where there is no padding"
        if self.is_given is None:
            count = comm.sum(torch.full((1,), int(given), device=x_TD.device))
            if not count.is_meta and int(count) not in (0, comm.size):
                allowed = f"{int(count)} of {comm.size} ranks have passed a mask"
                raise ConfigError("valid_T", describe(valid_T), allowed, fix)
            self.is_given = given
        if self.is_given != given:
            before = "passed" if self.is_given else "not passed"
            allowed = f"a mask was {before} in the first step, and the ranks must act alike"
            raise ConfigError("valid_T", describe(valid_T), allowed, fix)


def transform_error() -> ConfigError:
    """Return the error for a layer within vmap, grad, jvp or another transform of torch.func."""
    allowed = "cannot transform a MoE layer, whose rows per expert depend on the data"
    return ConfigError("torch.func", "vmap, grad or jvp", allowed, "use torch.autograd")


def input_error(x: Any, dim: int) -> ConfigError:
    """Return the error for an input that is not tokens [..., D] in floating point."""
    fix = "pass a tensor"
    if isinstance(getattr(x, "y", None), Tensor):
        fix = "pass its y, the tensor"
    elif isinstance(x, Tensor):
        fix = f"project it to {dim}, or build the layer with dim={x.shape[-1] if x.ndim else 1}"
        if not x.is_floating_point():
            fix = "embed token ids first, or cast it"
        elif x.ndim == 1 and x.shape[0] == dim:
            fix = "use x.unsqueeze(0) for one token"
    allowed = f"must be a floating-point tensor [..., T, {dim}], of width dim={dim}"
    return ConfigError("x", describe(x), allowed, fix)


def context_of_rows(context: TokenContext, tokens: torch.Size) -> TokenContext:
    """Return the context with one value per token.

    Args:
        context: its fields have the shape of the tokens, with or without dimensions of size 1, or
            [T]. Any shape of T values for tokens [T].
        tokens: shape of the layer's input without its width.

    Raises:
        ConfigError: not a context, or a mask of another shape. What reads an id, a label or a
            position checks its shape.
    """
    for name in CASTS:
        if not hasattr(context, name):
            fix = "give a mask as TokenContext(valid_T=mask)"
            raise ConfigError("context", describe(context), "must be a TokenContext", fix)
    flat: dict[str, Any] = {}
    for name in ("valid_T", "token_id_T", "label_T", "position_T"):
        value: Tensor | None = getattr(context, name)
        if value is None or value.shape == (tokens.numel(),):
            continue
        if _same_tokens(value.shape, tokens):
            flat[name] = value.flatten()
        elif name == "valid_T":
            allowed = f"must have the shape of the tokens, {list(tokens)} or [{tokens.numel()}]"
            raise ConfigError(name, describe(value), allowed, "give one value per token")
    return replace(context, **flat) if flat else context


def per_token_input(
    value_T: Tensor | None, x_TD: Tensor, kind: str, field: str, meaning: str
) -> Tensor:
    """Return `value_T` if it holds one value per token.

    Args:
        value_T: the context's field.
        x_TD: the tokens.
        kind, field, meaning: router kind, field of `TokenContext` and the field in words, for the
            message.

    Raises:
        ConfigError: it is missing or has another shape.
    """
    if value_T is None:
        raise ConfigError(
            field,
            None,
            f"router.kind={kind} needs the {meaning} of each token",
            f"pass TokenContext({field}=integer tensor [T])",
        )
    if value_T.shape != x_TD.shape[:1]:
        allowed = f"must be [{x_TD.shape[0]}], one {meaning} for each token"
        raise ConfigError(field, describe(value_T), allowed, "give one value per token")
    return value_T


def describe(value: object) -> str:
    """Return dtype and shape of a tensor, e.g. `float32[4, 16]`; the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _same_tokens(shape: torch.Size, tokens: torch.Size) -> bool:
    if len(tokens) == 1:
        return shape.numel() == tokens.numel()
    return [size for size in shape if size != 1] == [size for size in tokens if size != 1]


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())
