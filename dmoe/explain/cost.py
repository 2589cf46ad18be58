"""Cost of training: bytes between ranks, parameters, memory, FLOPs, and the optimizer.

Letters: T tokens of one process, D width, E experts, K experts per token, G groups, C slots, EP
expert-parallel size.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dmoe.config.plugin_loader import loaded_class
from dmoe.config.plugins import label, parse
from dmoe.config.router_kinds import router_spec
from dmoe.config.schedule import learning_rate, schedule_remarks
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.explain.setting import Section, Setting
from dmoe.modular import adapter_layers
from dmoe.moe.base_layer import MoELayer
from dmoe.report.format import BYTES_PER_NUMBER, format_bytes, format_count, format_flops, plural
from dmoe.report.sentences import EXCHANGE, model_sentence, optimizer_sentences
from dmoe.train.optimizer import muon_matrices

WEIGHT_BYTES = 4
"""Master weights are float32 in every precision; so are gradients and moments (AdamW has two, Muon
one), which frozen weights do not have."""


def explain_exchange(setting: Setting) -> Section | None:
    """Explain collectives and bytes between ranks; None for a dense model."""
    if setting.layer is None:
        return None
    config, exchange = setting.config, setting.config.moe.exchange
    if setting.ep == 1:
        sentences = ["EP = 1: every rank has all experts, so no token is sent."]
        numbers: dict[str, Any] = {
            "kind": exchange,
            "bytes_forward": 0,
            "collectives_forward": 0,
            "collectives_backward": 0,
        }
        return Section("exchange", "Exchange", [*sentences, _gradients(setting)], numbers)
    forward, backward, syncs = setting.collectives
    # The host also reads where the rows of each shape class begin.
    counted = exchange == "packed" or config.moe.capacity.pool > 1
    syncs += counted and bool(config.moe.experts.shapes)
    rows = rows_sent(setting)
    size = rows * config.model.dim * BYTES_PER_NUMBER[setting.wire]
    moe_layers = len(setting.model.moe_layers())
    repeats = config.train.recompute == "block"
    trips = 6 if repeats else 4
    step_size = trips * moe_layers * size * setting.batching.accumulation
    counting = {0: "", 1: " (one of them for row counts)", 2: " (two of them for row counts)"}
    counts = counting[forward - backward]
    repeated = "; recomputation repeats those of forward" if repeats else ""
    others = "the other rank" if setting.ep == 2 else f"the {setting.ep - 1} other ranks"
    sentences = [
        EXCHANGE[exchange],
        f"Collectives of one MoE layer: {forward} in forward{counts}, {backward} in backward, "
        f"{plural(syncs, 'host sync')}{repeated}.",
        f"One all-to-all sends {format_bytes(size)} from a rank{_assumption(setting)}: {rows:,.0f} "
        f"rows of {config.model.dim} numbers in {setting.wire} to {others} of its EP group. "
        f"With {trips - 2} in forward and 2 in backward of each of "
        f"{plural(moe_layers, 'MoE layer')}, a rank sends {format_bytes(step_size)} per step.",
        *_global_loss(setting),
        _gradients(setting),
    ]
    numbers = {
        "kind": exchange,
        "collectives_forward": forward,
        "collectives_backward": backward,
        "host_syncs": syncs,
        "rows_forward": rows,
        "bytes_forward": size,
        "bytes_exact": exchange == "padded",
        "bytes_per_step": step_size,
        "precision": setting.wire,
    }
    return Section("exchange", "Exchange", sentences, numbers)


def rows_sent(setting: Setting) -> float:
    """Return the rows that one rank sends to other ranks in one all-to-all.

    Exact if padded. If packed, the expectation if every expert is chosen equally often.
    """
    moe, slots = setting.config.moe, setting.slots()
    offered = None
    if slots.capacity is not None:
        # One rank cannot fill more slots of a group than it has tokens.
        filled = min(slots.capacity, setting.tokens)
        offered = setting.num_physical_experts * slots.groups * filled
    if moe.exchange == "padded":
        assert offered is not None
        rows: float = offered if moe.capacity.pool == 1 else setting.ep * setting.pooled_block
    else:
        assigned = setting.tokens * setting.rows_per_token
        rows = assigned if offered is None else min(assigned, offered)
    return rows * (setting.ep - 1) / setting.ep


def _assumption(setting: Setting) -> str:
    moe = setting.config.moe
    if moe.exchange == "padded":
        return ", always"
    if router_spec(moe.router.kind).variable_k:
        return " if every token takes its most experts and all are chosen equally often"
    return " if the experts are chosen equally often"


def _global_loss(setting: Setting) -> list[str]:
    balance = setting.config.moe.balance
    if not balance.switch or balance.switch_level != "global" or setting.world == 1:
        return []
    return ["The global switch loss adds one all-reduce of E + 1 numbers per layer."]


def _gradients(setting: Setting) -> str:
    if setting.world == 1:
        return "One rank: no gradient is sent."
    copies = ""
    if setting.edp > 1 and setting.layer is not None:
        copies = f", those of experts over their {setting.edp} copies"
    reduced = "summed (DDP)"
    if setting.config.parallel.mode == "fsdp":
        reduced = "reduce-scattered (FSDP2)"
    return (
        f"Dense gradients are {reduced} over all {setting.world} ranks{copies}; one control "
        "all-reduce per step carries norm, losses and counts."
    )


def explain_size(setting: Setting) -> Section:
    """Explain parameters, memory and FLOPs."""
    task, config = setting.task, setting.config
    model_size, (dense, experts) = setting.model.num_parameters(), rank_parameters(setting)
    forward = setting.model.flops_per_token(task.targets_per_sample)
    step_flops = 3 * forward * config.train.global_batch * task.targets_per_sample
    outputs = "vocabulary" if task.name == "language_modelling" else "classes"
    on_rank, weights = dense + experts, (dense + experts) * WEIGHT_BYTES
    gradients = sum(rank_parameters(setting, trained=True)) * WEIGHT_BYTES
    moments, kinds = 2 * gradients, "AdamW moments"
    if parse(config.optim.kind) is not None:
        names = getattr(loaded_class(config.optim.kind), "MOMENTS", ())
        moments, kinds = len(names) * gradients, f"moments of {label(config.optim.kind)}"
    if config.optim.moments == "bf16":
        moments, kinds = gradients, "AdamW moments in bfloat16"
    if config.optim.kind == "muon":
        moments -= sum(rank_parameters(setting, trained=True, only_muon=True)) * WEIGHT_BYTES
        kinds = "moments (one of Muon, two of AdamW)"
    casts = _cast_bytes(setting)
    copies = (
        f", + {format_bytes(casts)} copies in {setting.precision} for backward" if casts else ""
    )
    on_device = moments
    if config.optim.offload:
        on_device, kinds = 0, f"{kinds} (on the host, not in the sum)"
    total = weights + gradients + on_device + casts
    wide = "the rest" if config.optim.moments == "bf16" else "all"
    frozen = "" if gradients == weights else " (of trained parameters)"
    recomputed = {
        "block": " and a fourth forward for recomputation",
        "experts": " and a fourth forward of the experts",
    }.get(config.train.recompute, "")
    sentences = [
        model_sentence(config),
        f"Parameters: {format_count(model_size.total)} in total, "
        f"{format_count(model_size.active)} active per {task.unit}, {format_count(on_rank)} per "
        f"rank ({format_count(dense)} dense + {format_count(experts)} of "
        f"experts{_sharding(setting)}); {outputs} {task.num_outputs:,}.",
        f"Memory per rank: {format_bytes(weights)} weights + {format_bytes(gradients)} gradients + "
        f"{format_bytes(moments)} {kinds}{frozen}, {wide} float32"
        f"{copies} = {format_bytes(total)}, without activations and buffers.",
        f"Arithmetic: {format_flops(forward, 'FLOP')} per {task.unit} in forward, three times that "
        f"in training; {format_flops(step_flops, 'FLOP')} per step{recomputed}.",
    ]
    numbers = {
        "parameters": model_size.total,
        "active_parameters": model_size.active,
        "rank_parameters": on_rank,
        "rank_dense_parameters": dense,
        "rank_expert_parameters": experts,
        "vocabulary": task.num_outputs,
        "rank_bytes": {
            "weights": weights,
            "gradients": gradients,
            "moments": moments,
            "casts": casts,
            "total": total,
        },
        "flops_per_token_forward": forward,
        "flops_per_token": 3 * forward,
        "flops_per_step": step_flops,
    }
    return Section("size", "Size", sentences, numbers)


def _cast_bytes(setting: Setting) -> int:
    """Return the bytes of the weights' copies in bf16 or fp16 that backward needs.

    They are whole under FSDP2 too. Recomputed blocks make theirs again, one block at a time.
    """
    if setting.precision == "fp32" or setting.config.train.recompute == "block":
        return 0
    kept, config = sum(rank_parameters(setting, sharded=False)), setting.config
    if setting.task.name == "language_modelling" and config.model.source is None:
        kept -= setting.task.num_outputs * config.model.dim  # the loss is made in the forward
    return setting.bytes_per_number * kept


def rank_parameters(
    setting: Setting, trained: bool = False, sharded: bool = True, only_muon: bool = False
) -> tuple[int, int]:
    """Return the dense parameters and those of experts and modules on one rank.

    With `trained`, only parameters that are trained; with `only_muon`, that Muon updates. With
    fsdp, a rank's even share, rounded up; without `sharded`, what it holds once it is gathered.
    """
    of_experts = set(map(id, expert_parameters(setting.model).values()))
    matrices = muon_matrices(setting.model) if only_muon else {}
    counted = [
        p
        for name, p in setting.model.named_parameters()
        if (p.requires_grad or not trained) and (name in matrices or not only_muon)
    ]
    ids = set(map(id, counted))
    dense = sum(p.numel() for p in counted if id(p) not in of_experts)
    if setting.config.parallel.mode == "fsdp" and sharded:
        experts = sum(p.numel() for p in counted if id(p) in of_experts)
        return -(-dense // setting.world), -(-experts // setting.world)
    moe_layers = [layer for layer in setting.model.moe_layers() if _counts(layer.experts, ids)]
    banks = [
        layer.experts
        for layer in adapter_layers(setting.model).values()
        if _counts(layer.experts, ids)
    ]
    of_modules = sum(p.numel() // setting.ep for bank in banks for p in bank.parameters())
    partly = [layer for layer in moe_layers if not _all_counted(layer.experts, ids)]
    whole = [layer for layer in moe_layers if _all_counted(layer.experts, ids)]
    of_parts = sum(
        p.numel() // setting.ep for o in partly for p in o.experts.parameters() if id(p) in ids
    )
    return dense, _largest_share(setting, whole) + of_parts + of_modules


def _counts(experts: nn.Module, ids: set[int]) -> bool:
    """Return whether a layer's experts or modules are counted, or their factors of LoRA."""
    return any(id(p) in ids for p in experts.parameters())


def _all_counted(experts: nn.Module, ids: set[int]) -> bool:
    return all(id(p) in ids for p in experts.parameters())


def _largest_share(setting: Setting, moe_layers: list[MoELayer]) -> int:
    """Return the expert weights on the rank with the most; equal on all with uniform experts."""
    if not moe_layers:
        return 0
    return max(
        sum(layer.weights_of_experts[e] for layer in moe_layers for e in experts)
        for experts in map(setting.local_experts, range(setting.ep))
    )


def _sharding(setting: Setting) -> str:
    if setting.config.parallel.mode == "fsdp" and setting.world > 1:
        return ", both sharded by FSDP2"
    if setting.config.moe.experts.shapes or setting.ep == 1:
        return ""
    return f", 1/{setting.ep} of them"


def explain_optimization(setting: Setting) -> Section:
    """Explain schedule, optimizer and precision."""
    config, steps = setting.config, setting.config.train.steps
    resolved = ""
    if config.train.precision == "auto":
        resolved = " (auto)" if config.train.device == "cuda" else " (auto, on this machine)"
    sentences = [
        *optimizer_sentences(config),
        *(f"{remark}." for remark in schedule_remarks(config.optim, steps)),
        f"Precision: matrix products in {setting.precision}{resolved}; weights, optimizer and "
        "routing in float32.",
        "Gradients: dense and expert gradients are those of one global mean loss; no factor "
        "depends on the number of ranks.",
    ]
    numbers = {
        "optimizer": config.optim.kind,
        "schedule": config.optim.schedule,
        "peak": config.optim.lr,
        "first": learning_rate(0, steps, config.optim),
        "last": learning_rate(steps - 1, steps, config.optim),
        "warmup": config.optim.warmup,
        "steps": steps,
        "precision": setting.precision,
    }
    return Section("optimization", "Optimization", sentences, numbers)
