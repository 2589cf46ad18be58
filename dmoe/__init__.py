"""Distributed mixture-of-experts training: one run on one process, N gloo ranks or N GPUs.

The names in `__all__` are the public ones (docs/api.md); everything below may move.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dmoe.config.errors import ConfigError, DmoeError
    from dmoe.config.load import load as load_config
    from dmoe.config.schema import (
        BalanceConfig,
        CapacityConfig,
        Config,
        ExpertsConfig,
        MoEConfig,
        RouterConfig,
    )
    from dmoe.distributed.parallel_model import ParallelModel, parallelize
    from dmoe.models.base import Model, ModelOutput, token_losses
    from dmoe.moe.layer import MoE
    from dmoe.moe.metrics import MoEOutput
    from dmoe.moe.routers.base import LearnedRouter, RouterModule
    from dmoe.moe.routing import BatchShape, Routing, TokenContext
    from dmoe.train.api import Run, evaluate, load, read_metrics, train
    from dmoe.train.callbacks import Callback

_MODULES = {
    "BalanceConfig": "config.schema",
    "BatchShape": "moe.routing",
    "Callback": "train.callbacks",
    "CapacityConfig": "config.schema",
    "Config": "config.schema",
    "ConfigError": "config.errors",
    "DmoeError": "config.errors",
    "ExpertsConfig": "config.schema",
    "LearnedRouter": "moe.routers.base",
    "MoE": "moe.layer",
    "MoEConfig": "config.schema",
    "MoEOutput": "moe.metrics",
    "Model": "models.base",
    "ModelOutput": "models.base",
    "ParallelModel": "distributed.parallel_model",
    "RouterConfig": "config.schema",
    "RouterModule": "moe.routers.base",
    "Routing": "moe.routing",
    "Run": "train.api",
    "TokenContext": "moe.routing",
    "evaluate": "train.api",
    "load": "train.api",
    "load_config": "config.load:load",
    "parallelize": "distributed.parallel_model",
    "read_metrics": "train.api",
    "token_losses": "models.base",
    "train": "train",
}
"""Module of each public name, imported on first use, so that `dmoe --help` does not wait for torch.
`train` is the package itself, which can be called."""

__all__ = [
    "BalanceConfig",
    "BatchShape",
    "Callback",
    "CapacityConfig",
    "Config",
    "ConfigError",
    "DmoeError",
    "ExpertsConfig",
    "LearnedRouter",
    "MoE",
    "MoEConfig",
    "MoEOutput",
    "Model",
    "ModelOutput",
    "ParallelModel",
    "RouterConfig",
    "RouterModule",
    "Routing",
    "Run",
    "TokenContext",
    "__version__",
    "evaluate",
    "load",
    "load_config",
    "parallelize",
    "read_metrics",
    "token_losses",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dmoe' has no attribute {name!r}")
    module, _, attribute = _MODULES[name].partition(":")
    found = import_module(f"dmoe.{module}")
    return found if name == module else getattr(found, attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
