"""Inputs of float32 routing decisions, from which `ties.py` separates rounding from errors.

For one forward of one MoE layer, of this rank's tokens:

    score/...          [T, E]  gate scores, without the bias
    router_bias/...    [E]     load-balancing bias at that moment
    max_logit/...      [T]     largest absolute logit, at least 1; rounding is proportional to it
    chosen/...         [T, E]  experts that the router selected
    computed/...       [T, E]  experts that compute the token, after capacity
    follows_rules/...  [T]     True if the naive rules choose and keep the same from these scores

A router without learned scores (see `RouterSpec.learned`) has no close scores and records nothing.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmoe.config.router_kinds import ROUTERS
from dmoe.moe.layer import MoE, MoEOutput
from dmoe.moe.routing import DispatchPlan, Routing
from dmoe.verify.naive.capacity import Choices, apply_capacity
from dmoe.verify.naive.routing import choose_experts


@contextmanager
def record_routing(layers: Sequence[MoE]) -> Iterator[tuple[list[MoEOutput], list[Routing]]]:
    """Record the output and the router's decision of every layer that runs inside.

    A naive layer calls no router, so it adds no decision.
    """
    outputs: list[MoEOutput] = []
    routings: list[Routing] = []

    def record_output(module: object, inputs: object, output: MoEOutput) -> None:
        outputs.append(output)

    def record_decision(module: object, inputs: object, output: Routing) -> None:
        routings.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record_output).remove)
            stack.callback(layer.router.register_forward_hook(record_decision).remove)
        yield outputs, routings


def computed_experts(assigned: Routing | DispatchPlan) -> NDArray[np.bool_]:
    """Return the experts that compute each token of this rank [T, E]; of a routing, the selected.

    Reads the tensors on the host.
    """
    active_TK = assigned.is_selected_TK if isinstance(assigned, Routing) else assigned.is_kept_TK
    computed_TE = torch.zeros(len(active_TK), assigned.num_experts, dtype=torch.bool)
    # one choice at a time: a dropped one must not overwrite a kept one of the same expert
    for k in range(active_TK.shape[1]):
        computed_TE |= torch.zeros_like(computed_TE).scatter_(
            1, assigned.expert_TK[:, k : k + 1], active_TK[:, k : k + 1]
        )
    return computed_TE.numpy()


def decision_inputs(
    layer: MoE, output: MoEOutput, routing: Routing | None, sequences: int
) -> dict[str, NDArray[np.generic]]:
    """Return the arrays that the module's docstring lists, by the first part of their key.

    Collective (one gather of the scores) if all ranks share a capacity.

    Args:
        layer: MoE layer.
        output: of its forward.
        routing: the router's decision; None for a naive layer, which follows the rules.
        sequences: B, of this rank.
    """
    if not ROUTERS[layer.router.config.kind].learned:
        return {}
    scored, computed_TE = output.routing, computed_experts(output.plan)
    naive_chosen_TE, naive_kept_TE = naive_decisions(layer, scored.score_TE, sequences)
    chosen_TE = naive_chosen_TE if routing is None else computed_experts(routing)
    same_TE = (chosen_TE == naive_chosen_TE) & (computed_TE == naive_kept_TE)
    return {
        "score": scored.score_TE.detach().numpy().copy(),
        "router_bias": layer.router.get_buffer("bias_E").detach().numpy().copy(),
        "max_logit": scored.logit_TE.detach().abs().amax(1).clamp(min=1.0).numpy().copy(),
        "chosen": chosen_TE,
        "computed": computed_TE,
        "follows_rules": same_TE.all(1),
    }


def naive_decisions(
    layer: MoE, score_TE: Tensor, sequences: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Apply the naive rules to the layer's own scores.

    Returns:
        Experts chosen and experts kept [T, E] of this rank's tokens, given all the scores that
        share a capacity with them.
    """
    tokens, first = len(score_TE), 0
    if layer.capacity.group == "global":
        sequences, first = sequences * layer.comm.size, layer.comm.rank * tokens
        score_TE = layer.comm.gather(score_TE).flatten(0, 1)
    # the data of verify has no padding
    valid = [True] * len(score_TE)
    experts, next_experts = choose_experts(layer, score_TE, valid, sequences)
    choices = Choices(experts, next_experts, score_TE, score_TE, score_TE, valid)
    kept = apply_capacity(layer, choices, sequences)
    own = slice(first, first + tokens)
    return choices.mask(score_TE)[own].numpy(), kept.mask(score_TE)[own].numpy()
