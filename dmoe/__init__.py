"""Distributed mixture-of-experts training: one run on one process, N gloo ranks or N GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MoE", "__version__"]

if TYPE_CHECKING:
    from dmoe.moe.layer import MoE


def __getattr__(name: str) -> Any:
    """Import the layer on first use, so that `dmoe --help` does not wait for torch."""
    if name == "MoE":
        from dmoe.moe.layer import MoE

        return MoE
    raise AttributeError(f"module 'dmoe' has no attribute {name!r}")
