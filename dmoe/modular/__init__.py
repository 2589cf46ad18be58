"""Adapter modules on any network: modular deep learning (Pfeiffer et al. 2023) with MoE parts.

banks        what a module computes: a change of parameters, input or function
routing      which modules a token is sent to: fixed or learned, per token, sequence or task
aggregation  how the outputs of a token's modules are combined
layer        bank, router and aggregation beside one frozen target module
attach       layers on the target modules of a network, and their removal
base_model   freezing, its hash, adding modules, training one module of a bank
merge        modules merged into the weights of the base model, or averaged
files, peft  modules in safetensors files of their own, and in the format of `peft`
"""

from __future__ import annotations

from dmoe.modular.aggregation import AGGREGATIONS
from dmoe.modular.attach import (
    adapter_context,
    adapter_layers,
    attach,
    detach,
    initialize,
    module_losses,
)
from dmoe.modular.banks import (
    BANKS,
    Adapter,
    LoRA,
    Prefix,
    Prompt,
    Scale,
    SparseDelta,
    with_prefix_tokens,
)
from dmoe.modular.base_model import (
    TRAIN_MODES,
    add_modules,
    base_model_hash,
    freeze,
    freeze_all_but,
    select_trainable,
)
from dmoe.modular.files import inspect_modules, load_modules, save_modules
from dmoe.modular.layer import AdapterLayer
from dmoe.modular.merge import average, merge
from dmoe.modular.peft import export_peft, import_peft
from dmoe.modular.routing import constant, routed, table

__all__ = [
    "AGGREGATIONS",
    "BANKS",
    "TRAIN_MODES",
    "Adapter",
    "AdapterLayer",
    "LoRA",
    "Prefix",
    "Prompt",
    "Scale",
    "SparseDelta",
    "adapter_context",
    "adapter_layers",
    "add_modules",
    "attach",
    "average",
    "base_model_hash",
    "constant",
    "detach",
    "export_peft",
    "freeze",
    "freeze_all_but",
    "import_peft",
    "initialize",
    "inspect_modules",
    "load_modules",
    "merge",
    "module_losses",
    "routed",
    "save_modules",
    "select_trainable",
    "table",
    "with_prefix_tokens",
]
