"""Parameters, memory and arithmetic."""

from __future__ import annotations

from dmoe.distributed.parallelize import expert_parameters
from dmoe.training.explanation.section import Section, flop, many, size_of
from dmoe.training.explanation.setting import Setting

__all__ = ["describe", "rank_parameters"]

WEIGHT_BYTES = 4
"""Master weights are float32 in every precision; so are gradients and AdamW's two moments."""


def describe(setting: Setting) -> Section:
    whole, (dense, experts) = setting.model.num_parameters(), rank_parameters(setting)
    task = setting.task
    forward, steps = setting.model.flops_per_token(task.targets), setting.config.train.global_batch * task.targets
    outputs = "vocabulary" if task.name == "language_modelling" else "classes"
    held, weights = dense + experts, (dense + experts) * WEIGHT_BYTES
    words = [
        f"Parameters: {many(whole.total)} in all, {many(whole.active)} active a {task.unit}, {many(held)} on a rank "
        f"({many(dense)} dense + {many(experts)} of experts{_sharded(setting)}); {outputs} {task.outputs:,}.",
        f"Memory on a rank: {size_of(weights)} weights + {size_of(weights)} gradients + {size_of(2 * weights)} AdamW moments, all "
        f"float32 = {size_of(4 * weights)}, without activations and buffers.",
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
        "rank_bytes": {"weights": weights, "gradients": weights, "moments": 2 * weights, "total": 4 * weights},
        "flops_per_token_forward": forward,
        "flops_per_token": 3 * forward,
        "flops_per_step": 3 * forward * steps,
    }
    return Section("size", "Size", words, numbers)


def rank_parameters(setting: Setting) -> tuple[int, int]:
    """(dense, experts) that one rank keeps; under fsdp of each its even share, rounded up."""
    experts = sum(p.numel() for p in expert_parameters(setting.model).values())
    dense = sum(p.numel() for p in setting.model.parameters()) - experts
    if setting.config.parallel.mode == "fsdp":
        return -(-dense // setting.world), -(-experts // setting.world)
    return dense, _largest_share(setting)


def _largest_share(setting: Setting) -> int:
    """Weights of experts on the rank that has most of them; all ranks, where experts are uniform."""
    layers = setting.model.moe_layers()
    if not layers:
        return 0
    return max(
        sum(layer.experts.multiply_adds[e] for layer in layers for e in setting.owned(rank)) for rank in range(setting.ep)
    )


def _sharded(setting: Setting) -> str:
    if setting.config.parallel.mode == "fsdp" and setting.world > 1:
        return ", both spread by FSDP2"
    if setting.config.moe.experts.shapes:
        return ""
    return "" if setting.ep == 1 else f", 1/{setting.ep} of them"
