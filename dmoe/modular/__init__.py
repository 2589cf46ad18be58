"""Modules on a network: the general case of modular deep learning (Pfeiffer et al. 2023), built from the parts of the mixture layer.

banks         what a module computes, and how it enters the network: by its parameters, its input or its function
routing       which modules a token visits: fixed or learned, by token, sequence or task
aggregation   how their outputs become one
layer         the three together, beside one frozen module
attach        on any network by name, and off again; core: what is frozen, proven by hash; one_module, grow: adding without touching
merge         modules into the core's weights, or into one module; saved, peft_format: modules in files of their own
"""

from __future__ import annotations

from dmoe.modular.aggregation import AGGREGATIONS
from dmoe.modular.attach import attach, detach, given, initialize, layers, module_losses
from dmoe.modular.banks import (
    BANKS,
    Adapter,
    LowRank,
    Prefix,
    Prompt,
    Scale,
    SparseDelta,
    with_room,
)
from dmoe.modular.base_model import TRAIN, core_hash, freeze, grow, select, train_one
from dmoe.modular.files import inspect, load, save
from dmoe.modular.layer import Modular
from dmoe.modular.merge import average, merge
from dmoe.modular.peft import export_peft, import_peft
from dmoe.modular.routing import constant, routed, table

__all__ = [
    "AGGREGATIONS",
    "BANKS",
    "TRAIN",
    "Adapter",
    "LowRank",
    "Modular",
    "Prefix",
    "Prompt",
    "Scale",
    "SparseDelta",
    "attach",
    "average",
    "constant",
    "core_hash",
    "detach",
    "export_peft",
    "freeze",
    "given",
    "grow",
    "import_peft",
    "initialize",
    "inspect",
    "layers",
    "load",
    "merge",
    "module_losses",
    "routed",
    "save",
    "select",
    "table",
    "train_one",
    "with_room",
]
