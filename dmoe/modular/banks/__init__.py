"""Banks of modules, one kind a file.

parameter composition: LowRank, SparseDelta       input composition: Prompt, Prefix       function composition: Adapter, Scale
"""

from __future__ import annotations

from dmoe.modular.banks.adapter import Adapter, Scale
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.banks.prompt import Prefix, Prompt, with_prefix_tokens
from dmoe.modular.banks.weight_delta import LowRank, SparseDelta

__all__ = [
    "BANKS",
    "Adapter",
    "AdapterBank",
    "LowRank",
    "Prefix",
    "Prompt",
    "Scale",
    "SparseDelta",
    "with_prefix_tokens",
]

BANKS: dict[str, type[AdapterBank]] = {
    "low_rank": LowRank,
    "adapter": Adapter,
    "prompt": Prompt,
    "prefix": Prefix,
    "scale": Scale,
    "sparse_delta": SparseDelta,
}
"""Each is made as `kind(num_modules, in_dim, out_dim, **options)`."""
