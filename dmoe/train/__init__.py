"""The training run: step, evaluation, checkpoints, metrics. `dmoe.train(config)` is `api.train`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Python binds `dmoe.train` to this package, so the package itself is the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train as a config says; see `dmoe.train.api.train`."""
        from dmoe.train.api import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
