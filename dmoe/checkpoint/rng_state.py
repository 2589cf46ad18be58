"""State of torch's random generators on all ranks, as tensors of a checkpoint.

W = ranks; n = bytes of a generator's state. `random.cpu` is uint8 [W, n], row r the default
generator of rank r; `random.cuda` is the same for each rank's current CUDA device, if CUDA is in
use. Every rank saves all rows, so each is one plain tensor.

Rows belong to ranks: at another world size they have no meaning, and each rank keeps the state it
started with. Data order, noise, dropout and initial weights are keyed and do not use these
generators; they matter only to random numbers of a user's own module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.checkpoint.consensus import RankGroup
from dmoe.checkpoint.manifest import Manifest, TensorEntry
from dmoe.checkpoint.validate import describe_tensors

_PREFIX = "random."


def gather_rng_state(group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Gather every rank's generator states by name, on the CPU. Collective.

    Cost: one all-gather of 5 KB per rank, and a small one for CUDA.
    """
    ranks = RankGroup(group)
    return {name: ranks.gather(state) for name, state in _local_states().items()}


def rng_tables(
    saved: Manifest, group: dist.ProcessGroup | None
) -> tuple[dict[str, Tensor], str | None]:
    """Allocate tensors for the generator states of a checkpoint that this run can use.

    No collective: the result is the same on every rank.

    Returns:
        Tensors by name, to be loaded; and a sentence about generators that keep their state, or
        None.
    """
    entries = {name: entry for name, entry in saved.tensors.items() if name.startswith(_PREFIX)}
    if not entries:
        return {}, "the checkpoint holds no random state: every rank starts from a new one"
    size = RankGroup(group).size
    tables = {
        name: torch.zeros(size, state.numel(), dtype=torch.uint8)
        for name, state in _local_states().items()
    }
    wanted = describe_tensors(tables)
    usable = {name: table for name, table in tables.items() if entries.get(name) == wanted[name]}
    differences = [
        f"{name} {_format(entries.get(name))} in the checkpoint, {_format(wanted.get(name))} here"
        for name in sorted(entries.keys() | wanted.keys())
        if name not in usable
    ]
    if not differences:
        return usable, None
    return usable, (
        f"written by other ranks or devices ({'; '.join(differences)}): these start from a new"
        " state"
    )


def set_rng_state(tables: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Set this rank's generators from the loaded tables [W, n]."""
    rank = RankGroup(group).rank
    for name, table in tables.items():
        _set(name, table[rank].clone())


def _format(entry: TensorEntry | None) -> str:
    return "absent" if entry is None else "x".join(map(str, entry.shape))


def _local_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _set(name: str, state: Tensor) -> None:
    if name == "random.cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state)
