"""Thirty-two bugs, each as a patch of dmoe: fifteen that users of other systems reported, and fifteen
that earlier forms of `verify` did not see or did not name.

A patch is called in every rank before anything is built. Numbers as in docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config import schedule
from dmoe.distributed import data_parallel, gradients, state_dict
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.placement import moves as expert_moves
from dmoe.models import attention, transformer
from dmoe.moe import base_layer, dispatch, expert_queue, layer, rng
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.moe.routers import base
from dmoe.train import checkpointer, engine, optimizer, step

Patch = Callable[[], None]


def divided_by_edp() -> None:
    """1: average expert gradients over replicas, but sum dense ones (DeepSpeed#6545)."""
    finish = gradients.ExpertGradients.wait_for_grads

    def finish_and_divide(self: Any) -> None:
        finish(self)
        for parameter in self.parameters:
            parameter.grad /= self.replicas

    create = gradients.ExpertGradients.__init__

    def store_replicas(self: Any, model: Any, mesh: Any, *rest: Any) -> None:
        create(self, model, mesh, *rest)
        self.parameters, self.replicas = list(expert_parameters(model).values()), mesh.edp

    gradients.ExpertGradients.__init__ = store_replicas
    gradients.ExpertGradients.wait_for_grads = finish_and_divide


def norm_per_rank() -> None:
    """2: compute the global norm from this rank's experts only (Megatron-LM#785)."""
    own_sums: list[Tensor] = []
    unpack, square_sums = step.unpack, step.squared_grad_norms

    def own_experts_only(model: Any, mesh: Any) -> Tensor:
        own_sums[:] = [square_sums(model, mesh) * torch.tensor([mesh.world_size, mesh.edp])]
        return own_sums[0]

    step.squared_grad_norms = own_experts_only
    step.unpack = lambda numbers, like: replace(
        unpack(numbers, like), squared_grad_norm=float(own_sums[0].sum())
    )


def experts_averaged() -> None:
    """3: average the experts of different ranks, as plain DDP does."""
    finish = data_parallel.DDPStrategy.wait_for_grads

    def finish_and_average(self: Any) -> None:
        finish(self)
        for parameter in expert_parameters(self.wrapped).values() if dist.is_initialized() else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    data_parallel.DDPStrategy.wait_for_grads = finish_and_average


def broadcast_at_start() -> None:
    """4: broadcast the experts of rank 0 to all ranks (DDP's constructor)."""
    build = engine._build_model

    def build_and_broadcast(*args: Any) -> Any:
        model = build(*args)
        for parameter in expert_parameters(model).values():
            if dist.is_initialized():
                dist.broadcast(parameter.data, 0)
        return model

    engine._build_model = build_and_broadcast


def one_ranks_experts_saved() -> None:
    """5: save the experts of one rank for all ranks (DeepSpeed#6589, transformers#45662)."""
    model_state = state_dict.model_state

    def first_ranks(model: Any, mesh: Any) -> dict[str, Tensor]:
        found = dict(model_state(model, mesh))
        for name, value in found.items():
            if ".experts." in name and mesh.ep_group is not None:
                copy = gradients.local_tensor(value).clone()
                dist.broadcast(copy, 0)
                found[name] = type(value).from_local(
                    copy,
                    value.device_mesh,
                    value.placements,
                    run_check=False,
                    shape=value.shape,
                    stride=value.stride(),
                )
        return found

    _replace_in_all_modules("model_state", first_ranks)


def bias_after_drops() -> None:
    """6: update the bias from kept choices instead of all choices (Megatron, drop and pad)."""
    layer_stats = layer.layer_stats

    def after_drops(*args: Any) -> Any:
        stats = layer_stats(*args)
        return replace(stats, choice_E=stats.kept_E)

    layer.layer_stats = after_drops


def auxiliary_over_world() -> None:
    """7: scale auxiliary losses by 1/W once more (FastMoE: 1/W^2)."""
    auxiliary = layer.auxiliary_losses

    def scaled(
        routing: Any, config: Any, context: Any, shape: Any, comm: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = auxiliary(routing, config, context, shape, comm, **kwargs)
        return {name: loss / comm.size for name, loss in found.items()}

    layer.auxiliary_losses = scaled


def router_detached() -> None:
    """8: detach the combine weights from the main loss (Automodel#2995)."""
    combine_weights = base.combine_weights
    base.combine_weights = lambda *args, **kwargs: combine_weights(*args, **kwargs).detach()
    renormalized = base.renormalized_softmax

    def detached(*args: Any) -> tuple[Tensor, Tensor]:
        weight_TK, logit_TE = renormalized(*args)
        return weight_TK.detach(), logit_TE

    base.renormalized_softmax = detached


def race() -> None:
    """9: drop assignments in a random order (FastMoE's atomics)."""
    position = expert_queue.local_positions

    def shuffled(assignments: Any) -> Tensor:
        """Compute the positions of the same queues in a random order."""
        tokens, top_k = assignments.expert_TK.shape
        return position(
            replace(assignments, score_TK=torch.rand(tokens, top_k, dtype=torch.float64))
        )

    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 99)
    expert_queue.local_positions = shuffled


def capacity_from_rank() -> None:
    """10: compute the capacity from a number of tokens that differs by rank (tutel#173)."""
    expert_capacity = base_layer.expert_capacity

    def of_this_rank(factor: float, tokens: int, *rest: Any) -> int:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return expert_capacity(factor * (1 + 0.5 * rank), tokens, *rest)

    base_layer.expert_capacity = of_this_rank


def wrong_inverse() -> None:
    """11: return the rows of one expert in the wrong order."""
    packed_permutation = dispatch.packed_permutation

    def swapped(routing: Any) -> Any:
        permutation, count_E = packed_permutation(routing)
        own_TK = routing.expert_TK == 1
        rows = permutation.row_TK[own_TK]
        wrong_TK = permutation.row_TK.clone()
        wrong_TK[own_TK] = rows.roll(1)
        return replace(permutation, row_TK=wrong_TK), count_E

    _replace_in_all_modules("packed_permutation", swapped)


def weights_twice() -> None:
    """12: apply the combine weights twice."""
    combine = dispatch.unpermute
    _replace_in_all_modules(
        "unpermute",
        lambda rows, weight_TK, permutation: combine(rows, weight_TK * weight_TK, permutation),
    )


def initialised_by_rank() -> None:
    """13: initialize experts from a seed that depends on the EP rank (Megatron)."""
    initialize = MLPExperts.initialize
    MLPExperts.initialize = lambda self, seed, *rest: initialize(self, seed + self.first, *rest)


def moments_not_resharded() -> None:
    """14: reshard weights but not Adam's moments (Megatron-LM#5844)."""
    optimizer_state = state_dict.optimizer_state

    def only_weights(model: Any, optimizer: Any, mesh: Any) -> dict[str, Tensor]:
        found = optimizer_state(model, optimizer, mesh)
        for name, value in found.items():
            if ".experts." in name and mesh.ep_group is not None:
                # moments of other experts
                rolled = gradients.local_tensor(value).roll(1, 0)
                found[name] = type(value).from_local(
                    rolled,
                    value.device_mesh,
                    value.placements,
                    run_check=False,
                    shape=value.shape,
                    stride=value.stride(),
                )
        return found

    _replace_in_all_modules("optimizer_state", only_weights)


def counted_twice() -> None:
    """15: count the choices of recomputed activations again (torchtitan halves its counters)."""
    run = transformer.Transformer.run_block

    def run_and_count(self: Any, *args: Any) -> Any:
        x, aux, stats = run(self, *args)
        if self.recompute == "block" and torch.is_grad_enabled() and stats is not None:
            stats = replace(stats, choice_E=stats.choice_E * 2)
        return x, aux, stats

    transformer.Transformer.run_block = run_and_count


def routers_decayed() -> None:
    """16: decay routers like other matrices."""
    optimizer.NO_DECAY = tuple(part for part in optimizer.NO_DECAY if part != "router")


def prior_counts_kept_between_steps() -> None:
    """17: start a step with the counts of the step before (level `global`)."""
    forward, reduce_sum = step.forward, step.all_reduce_sum
    total: list[Tensor] = []

    def sum_and_keep(value: Tensor, mesh: Any) -> Tensor:
        value = reduce_sum(value, mesh)
        if value.dtype == torch.int64:
            total[:] = [sum(total, value)]
        return value

    def with_all(engine: Any, batch: Any, prior_LE: Any) -> Any:
        return forward(engine, batch, total[0] if total else prior_LE)

    step.all_reduce_sum, step.forward = sum_and_keep, with_all


def prior_counts_of_the_last_only() -> None:
    """18: keep the counts of the latest accumulation step only (level `global`)."""
    forward, reduce_sum = step.forward, step.all_reduce_sum
    latest: list[Tensor] = []

    def sum_and_keep(value: Tensor, mesh: Any) -> Tensor:
        value = reduce_sum(value, mesh)
        if value.dtype == torch.int64:
            latest[:] = [value.clone()]
        return value

    def with_latest(engine: Any, batch: Any, prior_LE: Any) -> Any:
        return forward(engine, batch, None if prior_LE is None else latest[0])

    step.all_reduce_sum, step.forward = sum_and_keep, with_latest


def auxiliary_not_divided() -> None:
    """19: add auxiliary losses once per accumulation step, not their mean."""
    loss = step._loss

    def undivided(output: Any, engine: Any, num_batches: int, num_targets: Any) -> Tensor:
        main = output.loss_sum / num_targets
        return main + num_batches * (loss(output, engine, num_batches, num_targets) - main)

    step._loss = undivided


def wrong_inverse_in_the_first_layer() -> None:
    """20: return the rows of one expert in the wrong order, in the first of two layers only."""
    correct = dispatch.packed_permutation
    wrong_inverse()
    wrong, calls = dispatch.packed_permutation, [0]

    def alternate(plan: Any) -> Any:
        calls[0] += 1
        return (wrong if calls[0] % 2 else correct)(plan)

    _replace_in_all_modules("packed_permutation", alternate)


def moments_swapped() -> None:
    """21: pass Adam's two decay rates in the wrong order."""
    build = engine.build_optimizer

    def swapped(model: Any, config: Any, *more: Any, **named: Any) -> Any:
        return build(model, replace(config, beta1=config.beta2, beta2=config.beta1), *more, **named)

    engine.build_optimizer = swapped


def noise_without_layer() -> None:
    """22: draw the same noise in every layer."""
    keyed_noise = rng.keyed_noise

    def same(draw: Any, purpose: str, x_TX: Tensor, width: int, layer: int, *rest: Any) -> Tensor:
        return keyed_noise(draw, purpose, x_TX, width, 0, *rest)

    _replace_in_all_modules("keyed_noise", same)


def positions_shifted() -> None:
    """23: start rotary positions at 1 for keys only: attention sees other distances."""
    rotary, calls = attention.apply_rotary, [0]

    def shifted(x_BSHA: Tensor, table: Any) -> Tensor:
        calls[0] += 1
        if calls[0] % 2:
            return rotary(x_BSHA, table)
        return rotary(x_BSHA, tuple(part.roll(1, 0) for part in table))

    attention.apply_rotary = shifted


def same_samples_on_every_rank() -> None:
    """24: every rank reads the samples of rank 0 (a sampler that was not told its rank)."""
    batches = step.training_batches

    def of_rank_zero(dataset: Any, engine: Any, number: int) -> Any:
        process = replace(engine.process, rank=0)
        return batches(dataset, replace(engine, process=process), number)

    _replace_in_all_modules("training_batches", of_rank_zero)


def ties_to_the_higher_expert() -> None:
    """25: give ties to the higher expert id, as an unstable sort may."""
    sort_experts = base.sort_experts

    def reversed_ids(score_TE: Tensor, eligible_TE: Tensor | None = None) -> Tensor:
        flipped = None if eligible_TE is None else eligible_TE.flip(-1)
        return score_TE.shape[1] - 1 - sort_experts(score_TE.flip(-1), flipped)

    _replace_in_all_modules("sort_experts", reversed_ids)


def one_step_late() -> None:
    """26: set the learning rate of the step before (a scheduler that is stepped too late)."""
    rate = schedule.learning_rate
    _replace_in_all_modules("learning_rate", lambda n, *rest: rate(max(0, n - 1), *rest))


def dense_averaged() -> None:
    """27: average dense gradients over the ranks, as DDP does by default."""
    wait = data_parallel.DDPStrategy.wait_for_grads

    def wait_and_average(self: Any) -> None:
        wait(self)
        experts = {id(p) for p in expert_parameters(self.wrapped).values()}
        for parameter in self.wrapped.parameters():
            if id(parameter) not in experts and dist.is_initialized():
                parameter.grad /= dist.get_world_size()

    data_parallel.DDPStrategy.wait_for_grads = wait_and_average


def bf16_parameters() -> None:
    """28: convert the model itself for bf16 instead of autocasting it."""
    build = engine._build_model

    def converted(task: Any, *rest: Any) -> Any:
        model = build(task, *rest)
        return model.to(torch.bfloat16) if task.config.train.precision == "bf16" else model

    engine._build_model = converted


def moments_unreadable() -> None:
    """29: raise an unexpected error while a checkpoint is read."""

    def broken(*args: Any) -> Any:
        return {}["optim.exp_avg"]

    checkpointer.set_optimizer_step = broken


def bias_with_the_wrong_sign() -> None:
    """30: raise the bias of busy experts and lower that of idle ones."""
    updated = step.updated_bias
    step.updated_bias = lambda bias_E, count_E, rate, recenter: updated(
        bias_E, count_E, -rate, recenter
    )


def moments_left_behind() -> None:
    """31: move the weights of an expert to another rank, and leave its moments."""
    listed = expert_moves.moving_tensors
    expert_moves.moving_tensors = lambda layer, optimizer: [
        tensor for tensor in listed(layer, optimizer) if isinstance(tensor, torch.nn.Parameter)
    ]


def stale_matrix() -> None:
    """32: move one of the two matrices of an expert, with its moments."""
    listed = expert_moves.moving_tensors
    expert_moves.moving_tensors = lambda layer, optimizer: [
        tensor for tensor in listed(layer, optimizer) if tensor is not layer.experts.w_out
    ]


def _replace_in_all_modules(name: str, replacement: Any) -> None:
    """Replace a function in every module of dmoe that imports it by name."""
    import sys

    for module in [m for key, m in sys.modules.items() if key.startswith("dmoe.")]:
        if hasattr(module, name) and callable(getattr(module, name)):
            setattr(module, name, replacement)


CAPACITY = ["moe.capacity.factor=1.0"]
MOVES = ["parallel.placement.kind=periodic"]
GLOBAL_LOSS = ["moe.balance.switch_level=global"]
BUGS: dict[str, tuple[Patch, list[str], str, str]] = {
    "1 divided by EDP": (divided_by_edp, [], "expert gradients", "times too small"),
    "2 norm per rank": (norm_per_rank, [], "global norm", "this rank's experts only"),
    "3 experts averaged": (experts_averaged, [], "expert gradients", "DDP"),
    "4 broadcast at start": (broadcast_at_start, [], "initial weights", "broadcast"),
    "5 one rank's experts saved": (
        one_ranks_experts_saved,
        [],
        "checkpoint written here, read by 1",
        "every rank's experts",
    ),
    "6 bias after drops": (
        bias_after_drops,
        [*CAPACITY, "moe.balance.bias=0.01"],
        "counts",
        "after drops",
    ),
    "7 auxiliary over W": (auxiliary_over_world, [], "auxiliary losses", "scaled"),
    "8 router detached": (router_detached, [], "router gradient", "detached"),
    "9 race": (race, CAPACITY, "dropped set", "race"),
    "10 capacity by rank": (capacity_from_rank, CAPACITY, "capacity slots", "depends on the rank"),
    "11 wrong inverse": (wrong_inverse, [], "layer outputs", "other tokens"),
    "12 weights twice": (weights_twice, [], "layer outputs", "weights applied twice"),
    "13 initialised by rank": (initialised_by_rank, [], "initial weights", "EP rank"),
    "14 moments not resharded": (
        moments_not_resharded,
        [],
        "checkpoint written here, read by 1",
        "moments",
    ),
    "15 counted twice": (counted_twice, [], "counts", "recomputed"),
    "16 routers decayed": (routers_decayed, [], "parameters after two steps", "weight decay"),
    "17 prior counts not reset": (
        prior_counts_kept_between_steps,
        GLOBAL_LOSS,
        "auxiliary losses",
        "accumulation steps",
    ),
    "18 last prior counts only": (
        prior_counts_of_the_last_only,
        GLOBAL_LOSS,
        "auxiliary losses",
        "accumulation steps",
    ),
    "19 auxiliary not divided": (
        auxiliary_not_divided,
        [],
        "router gradient",
        "auxiliary losses enter 3 times",
    ),
    "20 wrong inverse in the first layer": (
        wrong_inverse_in_the_first_layer,
        [],
        "layer outputs",
        "other tokens",
    ),
    "21 moments swapped": (moments_swapped, [], "moments", "decay rates"),
    "22 noise without layer": (
        noise_without_layer,
        ["moe.router.jitter=0.1"],
        "router scores",
        "keyed noise",
    ),
    "23 positions shifted": (positions_shifted, [], "layer inputs", "rotary"),
    "24 same samples": (same_samples_on_every_rank, [], "samples", "other samples"),
    "25 ties to the higher id": (ties_to_the_higher_expert, [], "chosen experts", "order of their"),
    "26 one step late": (one_step_late, [], "learning rate", "schedule"),
    "27 dense averaged": (dense_averaged, [], "dense gradients", "exactly 2 times too small"),
    "28 bf16 parameters": (bf16_parameters, [], "float32 under bf16", "kept in bf16"),
    "29 unreadable": (
        moments_unreadable,
        [],
        "checkpoint written here, read by 1",
        "reading raised an error",
    ),
    "30 bias with the wrong sign": (
        bias_with_the_wrong_sign,
        ["moe.balance.bias=0.01"],
        "bias",
        "sign",
    ),
    "31 moments left behind": (moments_left_behind, MOVES, "moments", "left behind"),
    "32 stale matrix": (stale_matrix, MOVES, "parameters after two steps", "stayed when it moved"),
}
"""Patch, overrides that it needs, first differing quantity and a phrase of the cause, by name."""
