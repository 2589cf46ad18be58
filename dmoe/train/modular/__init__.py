"""Adapter modules in a run: the config's section `modular`.

attach      modules on the model, before it is sharded; prefix positions; metrics
base_model  the weights that a run starts from
stages      a base model that is trained first, by the same command
session     the trainer's part: loading, compositions, proof of freezing
commands    `dmoe modules`
"""

from __future__ import annotations

from dmoe.train.modular.attach import (
    attach_modules,
    initialize_modules,
    module_metrics,
    select_trainable_parameters,
)

__all__ = [
    "attach_modules",
    "initialize_modules",
    "module_metrics",
    "select_trainable_parameters",
]
