"""Modules in a run: the section `modular` of the config, and what a trainer does about it.

attaching  from the config to modules on the model, before it is sharded; what is trained
room       positions in front of each sequence, for prompts and prefixes
telling    losses and counts of the modules, in the model's output
lines      the same in the lines of metrics.jsonl
core       the weights a run starts from: which they are, and how they get into the model
stages     a core that has to be trained first
proof      that what was frozen is what it was
session    the four together, for the trainer
commands   what `dmoe modules` does
"""

from __future__ import annotations

from dmoe.train.modular.attach import attach_modules, initialize_modules, module_metrics, select_trainable_parameters

__all__ = ["attach_modules", "initialize_modules", "module_metrics", "select_trainable_parameters"]
