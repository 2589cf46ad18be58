"""Record of a step: every kernel by its shapes, every collective, and the memory that is live.

A step on tensors without memory runs the same Python, autograd and kernels as a real one, so its
record is that of the real step. Stages are parts of a step between two marks, e.g. the forward of
one block.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.distributed.fake_world import Collective, collective_of
from dmoe.models import base
from dmoe.simulation.recording import operators
from dmoe.simulation.recording.host_copies import HostCopies
from dmoe.simulation.recording.kernel import Kernel, describe, tensors_of


@dataclass
class Stage:
    """Part of a step between two marks."""

    name: str
    delta: int = 0
    """Bytes that are live at its end and were not at its begin."""
    peak: int = 0
    """Most bytes live at one time, above those at its begin."""
    freed: Counter[str] = field(default_factory=Counter)
    """Bytes freed in it, by the stage that has allocated them."""
    copies: int = 0
    """Part of `delta` that is working copies of weights: casts, and what FSDP2 gathers."""
    copies_peak: int = 0
    """Most working copies live at one time, above those at its begin."""
    freed_copies: Counter[str] = field(default_factory=Counter)
    """Part of `freed` that is working copies."""
    kernels: Counter[Kernel] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)
    host_bytes: int = 0
    """Copied to the memory of the host, or back, by `train.offload=activations`."""


FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_"}

BLOCKS: Any = base
"""Where blocks are run, with `save_on_cpu` around them."""
CASTS = {"_to_copy", "stack", "cat", "constant_pad_nd"}
"""Operators that make a working copy of a weight, or of a copy, under autocast and by experts."""
PROMOTED = {"add", "sub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge"}
"""Operators of two operands that are first brought to one dtype."""


class StepRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what runs while it is active, in stages that `mark` opens.

    Memory is that of storages: allocated when one first appears, freed when its last tensor is; on
    a CPU also what operators copy to a common dtype. Work buffers of a kernel are not counted.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuda = cuda
        self.live, self.begin = 0, 0
        self.copies, self.live_copies, self.begin_copies = set[int](), 0, 0
        self.weights = set[int]()
        """Storages of the parameters, as this rank holds them."""
        self.elsewhere = set[int]()
        """Storages that are not on the device: moments in the memory of the host."""
        self.stages = [Stage("start")]
        self.known: dict[int, int] = {}
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.born: dict[int, str] = {}
        self.in_backward = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard takes as long as the record

    def mark(self, name: str) -> None:
        """Close the current stage and open the next."""
        self.stages[-1].delta = self.live - self.begin
        self.stages[-1].copies = self.live_copies - self.begin_copies
        self.begin, self.begin_copies = self.live, self.live_copies
        self.stages.append(Stage(name))

    def forget(self, tensors: list[Tensor]) -> None:
        """Take what is in the memory of the host off the count, now and later."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self.live -= self.known.pop(storage._cdata, 0)
            self.elsewhere.add(storage._cdata)

    def __enter__(self) -> Any:
        # FSDP2 frees and fills gathered weights by resizing their storage, which no operator does.
        real: Any = torch.UntypedStorage.resize_
        self.resize = real

        def resize(storage: Any, size: int) -> Any:
            result = real(storage, size)
            if storage._cdata in self.known:
                self._size(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        self.save_on_cpu = BLOCKS.save_on_cpu
        BLOCKS.save_on_cpu = partial(HostCopies, self._copy)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        BLOCKS.save_on_cpu = self.save_on_cpu
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _size(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.elsewhere:
            return
        before = self.known.get(key)
        if before is None:
            # not `weakref.finalize`, which takes five times as long
            self.alive[key] = weakref.ref(storage, lambda _: self._free(key))
            self.born[key] = self.stages[-1].name
        if before != size:
            self.known[key] = size
            self.live += size - (before or 0)
            stage = self.stages[-1]
            stage.peak = max(stage.peak, self.live - self.begin)
            if key in self.copies:
                self._grow_copies(size - (before or 0))

    def _copy(self, size: int) -> None:
        self.stages[-1].host_bytes += size

    def _grow_copies(self, more: int) -> None:
        self.live_copies += more
        stage = self.stages[-1]
        stage.copies_peak = max(stage.copies_peak, self.live_copies - self.begin_copies)

    def _mark_copies(self, short: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note which of the results are working copies of weights."""
        if short == "split_with_sizes_copy":  # FSDP2 fills what it has gathered
            made = list(tensors_of((kwargs or {}).get("out", ())))
        elif short in CASTS and self.stages[-1].name != "update":
            of = self.weights | self.copies
            if not all(t.untyped_storage()._cdata in of for t in tensors_of(args[0])):
                return
            made = list(tensors_of(out))
        else:
            return
        for storage in (t.untyped_storage() for t in made):
            if (key := storage._cdata) in self.known and key not in self.copies | self.weights:
                self.copies.add(key)
                self._grow_copies(self.known[key])

    def _free(self, key: int) -> None:
        size = self.known.pop(key, 0)
        self.live -= size
        del self.alive[key]
        born = self.born.pop(key, "")
        self.stages[-1].freed[born] += size
        if key in self.copies:
            self.copies.discard(key)
            self.live_copies -= size
            self.stages[-1].freed_copies[born] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls
        known = None
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            out: Any = _grouped_product(*args, **(kwargs or {}))
        elif func.namespace == "profiler":
            with no_dispatch():
                return func(*args, **(kwargs or {}))
        else:
            out, known = operators.run(func, args, kwargs or {})
        space, short = _names(func)
        if space == "c10d":
            if (collective := collective_of(short, args)) is not None:
                self.stages[-1].collectives[collective] += 1
            return out
        if func.is_view or space == "prim" or short == "detach":
            return out
        if short == "set_" or short == "resize_":
            self._size(args[0].untyped_storage())
        for tensor in tensors_of(out):
            self._size(tensor.untyped_storage())
        if short in CASTS or short == "split_with_sizes_copy":
            self._mark_copies(short, args, kwargs, out)
        if not self.cuda and short.rstrip("_") in PROMOTED:
            stage, copies = self.stages[-1], promoted(short, args)
            stage.peak = max(stage.peak, self.live + copies - self.begin)
        if short not in FREE:
            kernel = known.kernel if known is not None else None
            if kernel is None:
                kernel = describe(short, args, out)
                if known is not None:
                    known.kernel = kernel
            if kernel.bytes:
                self.stages[-1].kernels[kernel] += 1
        return out


@cache
def _names(func: Any) -> tuple[str, str]:
    """Return the namespace of an operator, and its name in it."""
    space, _, short = func._schema.name.partition("::")
    return space, short


def promoted(name: str, args: Any) -> int:
    """Return the bytes of the copies that a CPU makes of operands of unequal dtypes.

    Each operand that has not the common dtype is copied to it for the length of the call, and the
    result if it is written in place (torch, aten/src/ATen/TensorIterator.cpp, `compute_types`). A
    GPU converts in registers.
    """
    operands = [t for t in args[:2] if isinstance(t, Tensor)]
    if len(operands) < 2 or operands[0].dtype == operands[1].dtype:
        return 0
    common = torch.result_type(*operands)
    if name.endswith("_"):
        operands.append(operands[0])
    return sum(t.numel() * common.itemsize for t in tensors_of(operands) if t.dtype != common)


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """Stand for `_grouped_mm` of a dtype other than bfloat16.

    A GPU multiplies them too, but the rule for tensors without values refuses them (torch 2.13).
    """
    groups = () if right.dim() == 3 else (len(offs),)
    return left.new_empty((*groups, left.shape[0], right.shape[-1]))
