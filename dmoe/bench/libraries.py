"""The libraries that compute the same layer, each optional, with the weights of a `dmoe.MoE`.

Only `dmoe` computes statistics and the gradients of auxiliary losses. Tutel is on no package index,
and MegaBlocks, whose kernels are for GPUs, was not tried: neither has a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dmoe.bench.contender import CannotCompare, Contender
from dmoe.bench.mixtral_block import transformers, transformers_all_to_all
from dmoe.bench.more_libraries import deepspeed, deepspeed_autoep, st_moe, torchtitan
from dmoe.moe.layer import MoE

LIBRARIES: dict[str, Callable[[MoE, Tensor, Tensor], Contender]] = {
    "transformers": transformers,
    "torchtitan": torchtitan,
    "deepspeed": deepspeed,
    "deepspeed-autoep": deepspeed_autoep,
    "st-moe": st_moe,
}
"""Builders of the libraries, by name."""

OVER_RANKS: dict[str, Callable[[MoE, Tensor, Tensor, Any, int, int], Contender]] = {
    "transformers": transformers_all_to_all,
    "deepspeed": deepspeed,
    "deepspeed-autoep": deepspeed_autoep,
}
"""The same for a layer sharded over ranks: they take its process group, its size and the rank."""


def build_all(
    builders: Mapping[str, Callable[..., Contender]], names: tuple[str, ...] | None, *given: Any
) -> tuple[dict[str, Contender], str]:
    """Build the contenders of the installed libraries, and say in one sentence which are left out.

    Args:
        builders: by name; each raises ImportError where its library is not installed, and
            `CannotCompare` where it does not do the same work.
        names: those to build; None: all.
        given: what each builder takes.
    """
    found, without = {}, []
    for name, build in builders.items():
        if names is not None and name not in names:
            continue
        try:
            found[name] = build(*given)
        except ImportError as error:
            without.append(f"{name} is not installed ({error})")
        except CannotCompare as error:
            without.append(f"{name} {error}")
    return found, "; ".join(without) or "none"
