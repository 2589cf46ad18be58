"""Record of a step: every kernel by its shapes, every collective, and the memory that is live.

A step on tensors without memory runs the same Python, autograd and kernels as a real one, so its
record is that of the real step. Stages are parts of a step between two marks, e.g. the forward of
one block.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dmoe.distributed.fake_world import Collective, collective_of


class Kernel(NamedTuple):
    """One kernel call, as far as its time depends on it."""

    name: str
    """The operator; matrix products are `gemm` or `grouped_gemm`, attention `attention`."""
    shape: tuple[int, ...]
    """Matrix products: batch, rows, inner, columns. Attention: 1 for its backward, else 0."""
    dtype: str
    flops: int
    bytes: int
    """Read and written, each operand once."""


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
    kernels: Counter[Kernel] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)


GEMMS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0}
"""Matrix products, with the position of their first factor."""
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_"}


class StepRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what runs while it is active, in stages that `mark` opens.

    Memory is that of storages: allocated when one first appears, freed when its last tensor is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.begin = 0, 0
        self.stages = [Stage("start")]
        self.known: dict[int, int] = {}
        self.born: dict[int, str] = {}
        self.in_backward = False

    def mark(self, name: str) -> None:
        """Close the current stage and open the next."""
        self.stages[-1].delta = self.live - self.begin
        self.begin = self.live
        self.stages.append(Stage(name))

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
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _size(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self.known.get(key)
        if before is None:
            weakref.finalize(storage, self._free, key)
            self.born[key] = self.stages[-1].name
        if before != size:
            self.known[key] = size
            self.live += size - (before or 0)
            stage = self.stages[-1]
            stage.peak = max(stage.peak, self.live - self.begin)

    def _free(self, key: int) -> None:
        size = self.known.pop(key, 0)
        self.live -= size
        self.stages[-1].freed[self.born.pop(key, "")] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        space, _, short = name.partition("::")
        if space == "c10d":
            if (collective := collective_of(short, args)) is not None:
                self.stages[-1].collectives[collective] += 1
            return out
        if func.is_view or space == "prim" or short == "detach":
            return out
        if short == "set_" or short == "resize_":
            self._size(args[0].untyped_storage())
        for tensor in _tensors(out):
            self._size(tensor.untyped_storage())
        if short not in FREE:
            kernel = describe(short, args, out)
            if kernel.bytes:
                self.stages[-1].kernels[kernel] += 1
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors; of a sharded one (DTensor) the part of this rank."""
    for leaf in (tree,) if isinstance(tree, Tensor) else tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield getattr(leaf, "_local_tensor", leaf)


def describe(name: str, args: Any, out: Any) -> Kernel:
    """Return the kernel of one operator call."""
    given, made = list(_tensors(args)), list(_tensors(out))
    moved = sum(t.numel() * t.element_size() for t in (*given, *made))
    dtype = str(given[0].dtype if given else made[0].dtype if made else "").removeprefix("torch.")
    if name in GEMMS:
        first = GEMMS[name]
        left, right = args[first], args[first + 1]
        batch = left.shape[0] if left.dim() == 3 else 1
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        if name == "_grouped_mm":
            batch, rows, inner = _grouped(left, right)
        flops = 2 * batch * rows * inner * columns
        kind = "grouped_gemm" if name == "_grouped_mm" else "gemm"
        return Kernel(kind, (batch, rows, inner, columns), str(left.dtype)[6:], flops, moved)
    if "scaled_dot_product" in name or "_attention_" in name:
        backward = "backward" in name
        query, key = (given[1], given[2]) if backward else (given[0], given[1])
        # Causal: half of the products. Backward: 5 products for the 2 of forward.
        flops = (5 if backward else 2) * math.prod(query.shape) * key.shape[-2]
        return Kernel("attention", (int(backward),), str(query.dtype)[6:], flops, moved)
    return Kernel(name, (), dtype, 0, moved)


def _grouped(left: Tensor, right: Tensor) -> tuple[int, int, int]:
    """Return groups, mean rows and inner width of `grouped_mm`: over rows, or over the inner one.

    Rounded up, as a group without rows still costs a tile.
    """
    if right.dim() == 3:  # [R, I] x [e, I, O]
        groups = right.shape[0]
        return groups, -(-left.shape[0] // groups), left.shape[1]
    return 1, left.shape[0], left.shape[1]  # [I, R] x [R, O]: each row is in one group
