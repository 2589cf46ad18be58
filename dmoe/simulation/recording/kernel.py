"""One kernel call: operator, shapes, FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves


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


GEMMS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0}
"""Matrix products, with the position of their first factor; in place too."""
MOVERS = {
    "gather": 2,
    "index_select": 2,
    "index_copy_": 2,
    "embedding": 1,
    "scatter_": 2,
    "scatter_add_": 2,
}
"""Operators that touch only the rows of their index, with its position."""
SOURCES = {"index_copy_": 3, "scatter_": 3, "scatter_add_": 3}
"""Those that write into a tensor, with the position of what they write there."""


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors; of a sharded one (DTensor) the part of this rank."""
    for leaf in (tree,) if isinstance(tree, Tensor) else tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield getattr(leaf, "_local_tensor", leaf)


def describe(name: str, args: Any, out: Any) -> Kernel:
    """Return the kernel of one operator call."""
    given, made = list(tensors_of(args)), list(tensors_of(out))
    moved = sum(t.numel() * t.element_size() for t in (*given, *made))
    dtype = str(given[0].dtype if given else made[0].dtype if made else "").removeprefix("torch.")
    if name in MOVERS and len(args) > MOVERS[name]:
        # one operand may be large and be touched in few places
        index = args[MOVERS[name]]
        rest = args[SOURCES[name]] if len(args) > SOURCES.get(name, len(args)) else made[0]
        each = rest if isinstance(rest, Tensor) else index
        moved = index.numel() * index.element_size() + 2 * each.numel() * given[0].element_size()
    if (name := name.rstrip("_") if name.rstrip("_") in GEMMS else name) in GEMMS:
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
