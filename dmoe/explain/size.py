"""Parameters, memory and arithmetic."""

from __future__ import annotations

from torch import nn

from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.explain.section import Section, flop, many, size_of
from dmoe.explain.setting import Setting
from dmoe.modular import layers
from dmoe.moe.layer import MoE

WEIGHT_BYTES = 4
"""Master weights are float32 in every precision; so are gradients and AdamW's two moments, which frozen weights do not have."""


def describe(setting: Setting) -> Section:
    whole, (dense, experts) = setting.model.num_parameters(), rank_parameters(setting)
    task = setting.task
    forward, steps = (
        setting.model.flops_per_token(task.targets),
        setting.config.train.global_batch * task.targets,
    )
    outputs = "vocabulary" if task.name == "language_modelling" else "classes"
    held, weights = dense + experts, (dense + experts) * WEIGHT_BYTES
    gradients = sum(rank_parameters(setting, trained=True)) * WEIGHT_BYTES
    total = weights + 3 * gradients
    frozen = "" if gradients == weights else " (of what is trained)"
    words = [
        f"Parameters: {many(whole.total)} in all, {many(whole.active)} active a {task.unit}, {many(held)} on a rank "
        f"({many(dense)} dense + {many(experts)} of experts{_sharded(setting)}); {outputs} {task.outputs:,}.",
        f"Memory on a rank: {size_of(weights)} weights + {size_of(gradients)} gradients + {size_of(2 * gradients)} AdamW moments"
        f"{frozen}, all float32 = {size_of(total)}, without activations and buffers.",
        f"Arithmetic: {flop(forward)} a {task.unit} forward, three times that in training; {flop(3 * forward * steps)} a step"
        f"{' and a fourth forward for recomputation' if setting.config.train.recompute else ''}.",
    ]
    numbers = {
        "parameters": whole.total,
        "active_parameters": whole.active,
        "rank_parameters": held,
        "rank_dense_parameters": dense,
        "rank_expert_parameters": experts,
        "vocabulary": task.outputs,
        "rank_bytes": {
            "weights": weights,
            "gradients": gradients,
            "moments": 2 * gradients,
            "total": total,
        },
        "flops_per_token_forward": forward,
        "flops_per_token": 3 * forward,
        "flops_per_step": 3 * forward * steps,
    }
    return Section("size", "Size", words, numbers)


def rank_parameters(setting: Setting, trained: bool = False) -> tuple[int, int]:
    """(dense, experts and modules) that one rank keeps, or of them those that are `trained`; under fsdp of each its even share, rounded
    up."""
    stacks = set(map(id, expert_parameters(setting.model).values()))
    counted = [p for p in setting.model.parameters() if p.requires_grad or not trained]
    dense = sum(p.numel() for p in counted if id(p) not in stacks)
    if setting.config.parallel.mode == "fsdp":
        experts = sum(p.numel() for p in counted if id(p) in stacks)
        return -(-dense // setting.world), -(-experts // setting.world)
    moe_layers = [
        layer for layer in setting.model.moe_layers() if not trained or _trains(layer.experts)
    ]
    banks = [
        layer.experts
        for layer in layers(setting.model).values()
        if not trained or _trains(layer.experts)
    ]
    return dense, _largest_share(setting, moe_layers) + sum(
        p.numel() // setting.ep for bank in banks for p in bank.parameters()
    )


def _trains(experts: nn.Module) -> bool:
    """Of the experts of one layer all are trained or none; of modules too, for a moment is kept of each."""
    return any(p.requires_grad for p in experts.parameters())


def _largest_share(setting: Setting, moe_layers: list[MoE]) -> int:
    """Weights of experts on the rank that has most of them; all ranks, where experts are uniform."""
    if not moe_layers:
        return 0
    return max(
        sum(layer.experts.multiply_adds[e] for layer in moe_layers for e in setting.owned(rank))
        for rank in range(setting.ep)
    )


def _sharded(setting: Setting) -> str:
    if setting.config.parallel.mode == "fsdp" and setting.world > 1:
        return ", both spread by FSDP2"
    if setting.config.moe.experts.shapes:
        return ""
    return "" if setting.ep == 1 else f", 1/{setting.ep} of them"
