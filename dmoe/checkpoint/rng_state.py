"""torch's random generators of all ranks, as tensors that a checkpoint holds.

W = ranks; n = bytes of a generator's state. `random.cpu` is uint8 [W, n], row r the default generator of rank r, and so is
`random.cuda`, of each rank's current device, where CUDA is in use. Every rank saves all rows, so they are one plain tensor.

Rows belong to ranks: at another W there is no meaning in them, and each rank keeps the state it started with. The data order, noise,
dropout and initial weights do not depend on these generators at all (they are keyed); they matter to what a user's own module draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.manifest import Manifest, TensorEntry
from dmoe.checkpoint.tensor_entries import describe_tensors

_PREFIX = "random."


def gather_rng_state(group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Every rank's generators by name, on the CPU, equal on all ranks; collective. Cost: an all-gather of 5 KB a rank, and a small one
    for CUDA."""
    ranks = RankGroup(group)
    return {name: ranks.gather(state) for name, state in _own().items()}


def rng_tables(
    saved: Manifest, group: dist.ProcessGroup | None
) -> tuple[dict[str, Tensor], str | None]:
    """Empty tensors for those generator states of a checkpoint that this run can use, to be loaded with the rest; and a sentence on
    the generators that will stay as they are, or None. No collective: the same on every rank."""
    entries = {name: entry for name, entry in saved.tensors.items() if name.startswith(_PREFIX)}
    if not entries:
        return {}, "the checkpoint holds no random state: every rank draws from a fresh one"
    world = RankGroup(group).size
    tables = {
        name: torch.zeros(world, state.numel(), dtype=torch.uint8) for name, state in _own().items()
    }
    wanted = describe_tensors(tables)
    usable = {name: table for name, table in tables.items() if entries.get(name) == wanted[name]}
    left = [
        f"{name} {_size(entries.get(name))} there, {_size(wanted.get(name))} here"
        for name in sorted(entries.keys() | wanted.keys())
        if name not in usable
    ]
    return (
        usable,
        f"written by other ranks or devices ({'; '.join(left)}): drawn from a fresh state"
        if left
        else None,
    )


def set_rng_state(tables: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Set this rank's generators from the loaded `tables`."""
    rank = RankGroup(group).rank
    for name, table in tables.items():
        _set(name, table[rank].clone())


def _size(entry: TensorEntry | None) -> str:
    return "not" if entry is None else "x".join(map(str, entry.shape))


def _own() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set(name: str, state: Tensor) -> None:
    if name == "random.cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)
