"""Times measured by `dmoe plan --calibrate`: of kernels, matrix products and collectives.

A step on a CPU is thousands of kernels of microseconds, which no peak and no share of it describes.
So a calibrated cluster file has tables, by the number of ranks that compute at a time: they share
the memory's bandwidth, and the cores.

- Matrix products: seconds on a grid of rows, inner width and columns, by dtype. Between the points
  the logarithm of the rate (FLOP/s) is interpolated linearly in the logarithms of the sizes.
- All other kernels: seconds by the bytes read and written (attention and batched products: by
  FLOPs), by name and dtype, measured on the tensors of real steps.
- Collectives: seconds by the bytes that a rank sends.

Letters: n ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.distributed.fake_world import Collective
from dmoe.simulation.recording.kernel import Kernel

Curve = list[list[float]]
"""Points [size, seconds], the smallest size first."""
OTHER = "other"
"""Name of the curve of kernels that were not measured: that of all that were."""


@dataclass(frozen=True)
class Products:
    """Seconds of matrix products on a grid."""

    sizes: list[list[float]]
    """Rows, inner widths and columns."""
    seconds: list[float]
    """Time of each combination, the last size changing fastest."""

    def __post_init__(self) -> None:
        if len(self.sizes) != 3 or math.prod(map(len, self.sizes)) != len(self.seconds):
            raise ValueError("products must have one time for each combination of three sizes")
        _positive(*self.sizes, self.seconds)

    def __call__(self, shape: tuple[int, ...]) -> float:
        """Return the seconds of [rows, inner] x [inner, columns].

        Beyond the grid the time is proportional to the FLOPs; below it is that of the edge.
        """
        corners, inside = (
            [],
            [max(float(n), axis[0]) for n, axis in zip(shape, self.sizes, strict=True)],
        )
        for size, axis in zip(inside, self.sizes, strict=True):
            corners.append(_neighbours(size, axis))
        rate = 0.0
        for corner in product(*corners):
            place, weight, volume = 0, 1.0, 1.0
            for (index, share), axis in zip(corner, self.sizes, strict=True):
                place = place * len(axis) + index
                weight, volume = weight * share, volume * axis[index]
            if weight:
                rate += weight * math.log(volume / self.seconds[place])
        return math.prod(inside) / math.exp(rate)


def _neighbours(size: float, axis: list[float]) -> list[tuple[int, float]]:
    """Return the two places of a sorted axis around `size`, with the weight of each."""
    if size >= axis[-1]:
        return [(len(axis) - 1, 1.0)]
    upper = bisect_right(axis, size)
    low, high = axis[upper - 1], axis[upper]
    share = math.log(size / low) / math.log(high / low)
    return [(upper - 1, 1 - share), (upper, share)]


def read(curve: Curve, size: float, grows: bool = True) -> float:
    """Return the seconds at `size`, linear in the logarithms.

    Below the first point: its seconds. Above the last: proportional to the size, if it `grows`.
    """
    if size <= curve[0][0]:
        return curve[0][1]
    if size >= curve[-1][0]:
        return curve[-1][1] * (size / curve[-1][0] if grows else 1.0)
    (low, low_share), (high, high_share) = _neighbours(size, [point[0] for point in curve])
    logs = low_share * math.log(curve[low][1]) + high_share * math.log(curve[high][1])
    return math.exp(logs)


@dataclass(frozen=True)
class Measured:
    """Times measured with some number of ranks at a time."""

    ranks: int
    threads: int
    """Threads of each rank."""
    host_seconds: float
    """From the end of one kernel to the begin of the next, beside the kernels: Python, autograd."""
    wait_seconds: float
    """By which a collective of a step is slower than one of ranks that do nothing else: they do not
    begin it at the same time."""
    products: dict[str, Products]
    """By dtype. Empty: kernels were measured with fewer ranks only."""
    kernels: dict[str, Curve]
    """By `name_of`."""
    collectives: dict[str, Curve]
    """By kind."""

    def kernel_seconds(self, kernel: Kernel) -> float:
        """Return the seconds of one kernel call."""
        if kernel.name == "gemm" and kernel.shape[0] == 1 and kernel.dtype in self.products:
            return self.products[kernel.dtype](kernel.shape[1:])
        curve, other = self.kernels.get(name_of(kernel)), self.kernels[OTHER]
        if curve is None:
            return read(other, kernel.bytes)
        size, (first, least), (last, _) = size_of(kernel), curve[0], curve[-1]
        if size < first:
            # measured on large tensors only: as much less as all kernels take for fewer bytes,
            # products by their FLOPs, and never less than the smallest kernel
            share = size / first if kernel.flops else read(other, size) / read(other, first)
            return min(least, max(least * share, other[0][1]))
        if kernel.flops or size <= last:
            return read(curve, size)
        # measured on small tensors only: what all kernels take for more bytes
        return read(curve, size, grows=False) + max(0.0, read(other, size) - read(other, last))

    def collective_seconds(self, collective: Collective) -> float:
        """Return the seconds of one collective call, with the wait for the last rank."""
        kind = "all_reduce" if collective.name == "broadcast" else collective.name
        return read(self.collectives[kind], collective.sent) + self.wait_seconds


def name_of(kernel: Kernel) -> str:
    """Return the name of a kernel's curve."""
    name = kernel.name
    if name == "gemm":
        name = "batched products" if kernel.shape[0] > 1 else "products"
    elif name == "attention":
        name = "attention backward" if kernel.shape[0] else "attention forward"
    return f"{name} {kernel.dtype}"


def size_of(kernel: Kernel) -> float:
    """Return what a kernel's curve is over: FLOPs of products and attention, bytes of others."""
    return float(kernel.flops or kernel.bytes)


def to_plain(measured: Measured) -> dict[str, Any]:
    """Return numbers, lists and mappings, for a cluster file."""
    return asdict(measured)


def from_plain(content: Any) -> list[Measured]:
    """Read the tables of a cluster file. Raises ValueError, TypeError or KeyError."""
    names = {f.name for f in fields(Measured)}
    found = []
    for entry in content:
        if entry.keys() != names:
            raise ValueError(f"each of measured must have {', '.join(sorted(names))}")
        products = {dtype: Products(**table) for dtype, table in entry["products"].items()}
        for curve in (*entry["kernels"].values(), *entry["collectives"].values()):
            if not curve or sorted(curve) != curve:
                raise ValueError("a curve must have points [size, seconds], the smallest first")
            _positive(*curve)
        found.append(Measured(**{**entry, "products": products}))
    if not found or not found[0].products or OTHER not in found[0].kernels:
        raise ValueError("the first of measured must have products and kernels")
    return found


def _positive(*numbers: list[float]) -> None:
    if not all(math.isfinite(n) and n > 0 for each in numbers for n in each):
        raise ValueError("sizes and seconds must be above 0")


def at(tables: list[Measured], world: int) -> tuple[Measured, float, Measured]:
    """Return what holds for `world` ranks on this machine.

    Returns:
        The table of kernels; by what factor they are slower, as ranks share a core; the table of
        collectives, that of the next larger number of ranks.
    """
    computing = [table for table in tables if table.products]
    compute = max((t for t in computing if t.ranks <= world), key=lambda t: t.ranks)
    sharing = [t for t in tables if t.collectives]
    if world == 1:
        return compute, 1.0, compute
    if not sharing:
        allowed = "have to exchange, and the cluster file was calibrated for one rank"
        fix = f"calibrate it with --ranks 1,{world}"
        raise ConfigError("--ranks", world, allowed, fix)
    link = min(sharing, key=lambda t: (t.ranks < world, abs(t.ranks - world)))
    most = max(t.ranks for t in computing)
    return compute, max(1.0, world / most), link
