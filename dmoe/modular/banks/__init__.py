"""Banks of modules, by how a module changes the network (Pfeiffer et al. 2023, section 3).

parameter composition  weight_delta  LoRA, SparseDelta
input composition      prompt        Prompt, Prefix
function composition   adapter       Adapter, Scale
"""

from __future__ import annotations

from dmoe.modular.banks.adapter import Adapter, Scale
from dmoe.modular.banks.base import AdapterBank
from dmoe.modular.banks.prompt import Prefix, Prompt, with_prefix_tokens
from dmoe.modular.banks.weight_delta import LoRA, SparseDelta

__all__ = [
    "BANKS",
    "Adapter",
    "AdapterBank",
    "LoRA",
    "Prefix",
    "Prompt",
    "Scale",
    "SparseDelta",
    "with_prefix_tokens",
]

BANKS: dict[str, type[AdapterBank]] = {
    "low_rank": LoRA,
    "adapter": Adapter,
    "prompt": Prompt,
    "prefix": Prefix,
    "scale": Scale,
    "sparse_delta": SparseDelta,
}
"""Bank classes by config name, constructed as `kind(num_modules, in_dim, out_dim, **options)`."""
