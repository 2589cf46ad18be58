"""Names that other frameworks have for the fields, and the field that an unknown key stands for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

ALIASES = {
    "learning_rate": "optim.lr",
    "warmup_steps": "optim.warmup",
    "max_grad_norm": "optim.clip",
    "clip_grad": "optim.clip",
    "gradient_clipping": "optim.clip",
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "eval_steps": "train.eval_every",
    "eval_interval": "train.eval_every",
    "output_dir": "train.run_dir",
    "dtype": "train.precision",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "seq_length": "data.seq_len",
    "block_size": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "dataset": "data.source",
    "text_column": "data.text_field",
    "dataset_text_field": "data.text_field",
    "label_column": "data.label_field",
    "eval_dataset": "data.validation_source",
    "val_source": "data.validation_source",
    "hidden_size": "model.dim",
    "n_embd": "model.dim",
    "num_layers": "model.layers",
    "n_layer": "model.layers",
    "num_hidden_layers": "model.layers",
    "n_head": "model.heads",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "moe_intermediate_size": "moe.expert_dim",
    "num_local_experts": "moe.num_experts",
    "num_experts_per_tok": "moe.top_k",
    "topk": "moe.top_k",
    "capacity_factor": "moe.capacity.factor",
    "router_aux_loss_coef": "moe.balance.switch",
    "aux_loss_coeff": "moe.balance.switch",
    "z_loss_coeff": "moe.balance.z",
    "ep_size": "parallel.ep",
    "expert_parallel_size": "parallel.ep",
    "expert_model_parallel_size": "parallel.ep",
    "report_to": "tracking.trackers",
    "wandb_project": "tracking.project",
}
"""The field that another framework's name stands for."""

BOOLEAN_WORDS: dict[str, dict[bool, str]] = {
    "train.recompute": {True: "block", False: "none"},
    "tracking.trace": {False: "none"},
}
"""Booleans that a field of words still takes: of earlier versions, and `off`, which YAML reads as
False."""


def suggest_field(key: str, prefix: str, known: Sequence[str], children: Sequence[str]) -> str:
    """Return the field that an unknown key stands for, or nothing.

    It may be in another section, another framework's name, or misspelt.

    Args:
        key: the unknown key, e.g. `lr`.
        prefix: the section it was given in, and a dot.
        known: dotted names of all fields.
        children: names in that section.
    """
    elsewhere = [name for name in known if name.rpartition(".")[2] == key]
    if elsewhere:
        return " or ".join(elsewhere[:3])
    if key in ALIASES:
        return ALIASES[key]
    near = difflib.get_close_matches(key, children, n=1)
    return f"{prefix}{near[0]}" if near else ""
