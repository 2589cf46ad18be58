"""Operators on tensors without values: as torch's FakeTensorMode runs them, in a part of its time.

The mode looks every call up by its arguments, which takes longer than what it looks up. Here the
kind of an operator is read once, from its schema:

    view         the kernel of the meta device
    in place     the first argument; `out=`: that argument; no result: none
    functional   tensors of the shapes that FakeTensorMode gave to the first call of its kind
    other        FakeTensorMode itself

What a call reads and writes is known with its shapes, so that its `Kernel` is looked up too. A test
compares a record with that of FakeTensorMode for all operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

from dmoe.simulation.recording.kernel import Kernel, tensors_of

UNKNOWN_SHAPES = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
         torch.memory_format)  # fmt: skip
"""Arguments whose value is part of the key of a call."""


class Kind(Enum):
    """How an operator is run."""

    VIEW = 1
    IN_PLACE = 2
    OUT = 3
    FUNCTIONAL = 4
    OTHER = 5


class Shape(NamedTuple):
    """A tensor that a functional operator makes, in a storage of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class Known:
    """The facts that calls with equal arguments share."""

    results: type | None = None
    """None: one tensor; else the sequence that holds them."""
    shapes: tuple[Shape | None, ...] = ()
    """Of a functional operator; empty: not known."""
    kernel: Kernel | None = None


@cache
def kind_of(func: Any) -> Kind:
    """Return how an operator is run."""
    schema, tags = func._schema, set(func.tags)
    space, _, name = schema.name.partition("::")
    if tags & UNKNOWN_SHAPES or space not in ("aten", "c10d", "fsdp") or name == "lift_fresh":
        return Kind.OTHER
    if func.is_view or space == "c10d" or name in ("_unsafe_view", "all_gather_copy_in"):
        return Kind.VIEW
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if torch.Tag.inplace in tags or (written and not schema.returns):
        return Kind.IN_PLACE
    if torch.Tag.out in tags and len(written) == len(schema.returns) == 1:
        return Kind.OUT
    is_free = not any(a.alias_info for a in (*schema.arguments, *schema.returns))
    return Kind.FUNCTIONAL if is_free and space == "aten" else Kind.OTHER


@cache
def _calls_of(func: Any) -> dict[Any, Known]:
    """Return what is known of an operator's calls in this process, by their arguments."""
    return {}


def run(func: Any, args: Any, kwargs: Any) -> tuple[Any, Known | None]:
    """Run an operator, as under the FakeTensorMode that is active.

    Returns:
        Its result, and what is known of calls of this kind; None: nothing, since an argument is no
        plain tensor without values.
    """
    kind = kind_of(func)
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if kind is Kind.OTHER or mode is None:
        return func(*args, **kwargs), None
    if kind is Kind.VIEW:
        return _run_meta_kernel(func, args, kwargs, mode), None
    signature: list[Any] = [torch.get_default_dtype()]
    if not (_sign(args, signature, mode) and (not kwargs or _sign(kwargs, signature, mode))):
        return func(*args, **kwargs), None
    calls, key = _calls_of(func), tuple(signature)
    if (known := calls.get(key)) is None:
        calls[key] = known = Known()
        out = func(*args, **kwargs)
        if kind is Kind.FUNCTIONAL:
            _learn(known, out, (args, kwargs), mode)
        return out, known
    if kind is Kind.IN_PLACE:
        return (args[0] if func._schema.returns else None), known
    if kind is Kind.OUT and (out := kwargs[func._schema.arguments[-1].name]).numel():
        return out, known  # an empty one may be given its size by the kernel
    if not known.shapes:
        return func(*args, **kwargs), known
    made = [None if shape is None else _new(shape, mode) for shape in known.shapes]
    return (made[0] if known.results is None else known.results(made)), known


def _sign(value: Any, signature: list[Any], mode: FakeTensorMode) -> bool:
    """Append the arguments to the key of a call; return False if they do not determine it."""
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.fake_mode is not mode:
            return False
        signature += (value.shape, value.stride(), value.dtype, value.fake_device)
        return True
    if kind in (tuple, list):
        signature += (kind, len(value))
        return all(_sign(each, signature, mode) for each in value)
    if kind is dict:
        signature += value
        return all(_sign(each, signature, mode) for each in value.values())
    signature += (kind, value)  # 1 and 1.0 are equal, and give other dtypes
    return kind in PLAIN


def _learn(known: Known, out: Any, given: Any, mode: FakeTensorMode) -> None:
    """Note the shapes of what a call returned, if all of it is new tensors."""
    results = None if isinstance(out, Tensor) else type(out)
    made = (out,) if results is None else out
    if results not in (None, tuple, list):
        return
    shapes = list[Shape | None]()
    storages = {t.untyped_storage()._cdata for t in tensors_of(given)}
    for tensor in made:
        if tensor is None:
            shapes.append(None)
            continue
        if type(tensor) is not FakeTensor or tensor.constant is not None or tensor.requires_grad:
            return
        size, stride = tuple(tensor.shape), tensor.stride()
        shape = Shape(size, stride, tensor.dtype, tensor.fake_device)
        storage, again = tensor.untyped_storage(), _new(shape, mode).untyped_storage()
        if storage._cdata in storages or storage.nbytes() != again.nbytes():
            return  # a view, or more memory than its elements need
        storages.add(storage._cdata)
        shapes.append(shape)
    known.results, known.shapes = results, tuple(shapes)


def _new(shape: Shape, mode: FakeTensorMode) -> Any:
    with torch._C._DisableTorchDispatch():
        size, stride, dtype, device = shape
        return as_fake(torch.empty_strided(size, stride, dtype=dtype, device="meta"), mode, device)


def _run_meta_kernel(func: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Run an operator by its kernel of the meta device alone."""
    device = None
    for tensor in _plain_tensors((args, kwargs)):
        if type(tensor) is not FakeTensor or tensor.constant is not None:
            return func(*args, **kwargs)
        device = device or tensor.fake_device
    if device is None:
        return func(*args, **kwargs)
    with in_kernel_invocation_manager(mode):
        out = func(*args, **kwargs)
    if isinstance(out, Tensor):
        return as_fake(out, mode, device)
    if isinstance(out, (tuple, list)):
        return type(out)(
            as_fake(each, mode, device) if isinstance(each, Tensor) else each for each in out
        )
    return out


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        if value and type(value[0]) is int:
            return
        for each in value:
            yield from _plain_tensors(each)
    elif isinstance(value, dict) and value:
        yield from _plain_tensors(list(value.values()))


@lru_cache(maxsize=2)
def _attributes(mode: FakeTensorMode, device: torch.device) -> dict[str, Any]:
    """Return the attributes of a FakeTensor of a mode and device."""
    with torch._C._DisableTorchDispatch():
        return dict(vars(FakeTensor(mode, torch.empty((), device="meta"), device)))


def as_fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Any:
    """Make a tensor of the meta device one of `mode`: as its constructor, without its checks."""
    if isinstance(tensor, FakeTensor):  # what an argument was
        return tensor
    make: Any = Tensor._make_subclass
    made = make(FakeTensor, tensor, False, dispatch_device=True, device_for_backend_keys=device)
    torch._C._set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(_attributes(mode, device))
    return made
