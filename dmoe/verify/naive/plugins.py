"""Code of the user's own in the naive layer and step: by its own reference, if it has one.

A class may have a `reference` beside what it must have (docs/plugins.md). Without one the class
itself is asked: then N ranks are compared with one process, not with a formula.

Letters: T tokens, D width, E experts, K experts per token, S next experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config.plugin_loader import construct, loaded_class
from dmoe.config.plugins import references
from dmoe.config.schedule import own_schedule
from dmoe.config.schema import Config, OptimConfig
from dmoe.moe.layer import MoE
from dmoe.moe.routing import BatchShape, Routing, TokenContext
from dmoe.verify.naive.capacity import Choices, capacity_and_groups, has_capacity


def without_reference(config: Config) -> dict[str, str]:
    """Say of code of the user's own that it has no reference: nothing checks its formula."""
    why = "has no reference of its own: N ranks are compared with one process, not its formula"
    return {
        field: f"{reference.label} {why}"
        for field, reference in references(config).items()
        if not field.startswith("data.") and not hasattr(loaded_class(str(reference)), "reference")
    }


def own_choices(
    layer: MoE, x_TD: Tensor, context: TokenContext, sequences: int, valid: list[bool]
) -> Choices:
    """Ask a router of the user's own: its `reference` if it has one, else its forward."""
    shape = BatchShape(sequences)
    if has_capacity(layer):
        capacity, groups = capacity_and_groups(layer, len(x_TD), sequences)
        shape = BatchShape(sequences, groups, capacity)
    decide = getattr(layer.router, "reference", layer.router.forward)
    routing: Routing = decide(x_TD, context, shape)
    selected_TK, next_TS = routing.is_selected_TK.tolist(), routing.next_expert_TS
    weight_TE = torch.zeros_like(routing.score_TE)
    weight_TE = weight_TE.scatter(1, routing.expert_TK, routing.weight_TK)
    following: list[list[int]] = [[] for _ in valid]
    if next_TS is not None and routing.next_weight_TS is not None:
        following = [[e for e in row if e >= 0] for row in next_TS.tolist()]
        exists_TS = (next_TS >= 0).to(weight_TE)
        weight_TE = weight_TE.scatter_add(
            1, next_TS.clamp(min=0), routing.next_weight_TS * exists_TS
        )
    experts = [
        [e for e, selected in zip(row, mask, strict=True) if selected]
        for row, mask in zip(routing.expert_TK.tolist(), selected_TK, strict=True)
    ]
    return Choices(experts, following, routing.logit_TE, routing.score_TE, weight_TE, valid)


def own_loss(layer: MoE, choices: Choices, units: int) -> Tensor:
    """Return the mean of the user's own loss over the units of all tokens."""
    config = layer.balance
    assert config.kind is not None
    loss = construct(config.kind, "moe.balance.kind", options=config.options)
    mask_TE = choices.mask(choices.score_TE)
    expert_TE = torch.arange(mask_TE.shape[1]).expand_as(mask_TE)
    routing = Routing(
        expert_TE, choices.weight_TE, choices.score_TE, choices.logit_TE, selected_TK=mask_TE
    )
    values: Tensor = getattr(loss, "reference", loss.values)(routing, None, units)
    return values.mean()


def own_expert_output(layer: MoE, e: int, x_TD: Tensor) -> Tensor:
    """Apply expert e of the user's own class to all tokens."""
    experts: Any = layer.experts
    if hasattr(experts, "reference"):
        output: Tensor = experts.reference(e, x_TD)
        return output
    rows_E = torch.zeros(experts.num_experts, dtype=torch.int64)
    rows_E[e] = len(x_TD)
    computed: Tensor = experts.forward(x_TD, rows_E)
    return computed


def own_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of a step by the user's own schedule."""
    schedule = own_schedule(num_steps, config)
    return float(getattr(schedule, "reference", schedule.rate)(step))


def own_update(
    optimizer: Any, named: dict[str, nn.Parameter], gradients: dict[str, Tensor], rate: float
) -> None:
    """Take one step of the user's own optimizer in place.

    Args:
        optimizer: its `reference(weight, gradient, state, group)` returns the new weight and
            updates the state.
        named: the parameters.
        gradients: of each of them, clipped.
        rate: learning rate of the run.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    if not hasattr(optimizer, "reference"):
        for name, parameter in named.items():
            parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        return
    name_of = {id(parameter): name for name, parameter in named.items()}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in name_of:
                    gradient, state = gradients[name_of[id(p)]], optimizer.state[p]
                    p.copy_(optimizer.reference(p.clone(), gradient, state, group))
