"""Fifteen bugs that users of other systems reported, each as a patch of dmoe.

A patch is called in every rank before anything is built. Numbers as in docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.distributed import data_parallel, gradients, state_dict
from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.models import transformer
from dmoe.moe import dispatch, expert_queue, layer
from dmoe.moe.experts.grouped_mlp import MLPExperts
from dmoe.moe.routers import base
from dmoe.train import engine, step

Patch = Callable[[], None]


def divided_by_edp() -> None:
    """1: average expert gradients over replicas, but sum dense ones (DeepSpeed#6545)."""
    finish = gradients.ExpertGradients.wait_for_grads

    def finish_and_divide(self: Any) -> None:
        finish(self)
        for parameter in self.parameters:
            parameter.grad /= self.replicas

    create = gradients.ExpertGradients.__init__

    def store_replicas(self: Any, model: Any, mesh: Any) -> None:
        create(self, model, mesh)
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
    expert_capacity = layer.expert_capacity

    def of_this_rank(factor: float, tokens: int, *rest: Any) -> int:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return expert_capacity(factor * (1 + 0.5 * rank), tokens, *rest)

    layer.expert_capacity = of_this_rank


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
        if self.recompute and torch.is_grad_enabled() and stats is not None:
            stats = replace(stats, choice_E=stats.choice_E * 2)
        return x, aux, stats

    transformer.Transformer.run_block = run_and_count


def _replace_in_all_modules(name: str, replacement: Any) -> None:
    """Replace a function in every module of dmoe that imports it by name."""
    import sys

    for module in [m for key, m in sys.modules.items() if key.startswith("dmoe.")]:
        if hasattr(module, name) and callable(getattr(module, name)):
            setattr(module, name, replacement)


CAPACITY = ["moe.capacity.factor=1.0"]
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
    "11 wrong inverse": (wrong_inverse, [], "loss", "other tokens"),
    "12 weights twice": (weights_twice, [], "loss", "weights applied twice"),
    "13 initialised by rank": (initialised_by_rank, [], "initial weights", "EP rank"),
    "14 moments not resharded": (
        moments_not_resharded,
        [],
        "checkpoint written here, read by 1",
        "moments",
    ),
    "15 counted twice": (counted_twice, [], "counts", "recomputed"),
}
"""Patch, overrides that it needs, first differing quantity and a phrase of the cause, by name."""
