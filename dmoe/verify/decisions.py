"""What a float32 decision was made from, so that `ties.py` can tell rounding from an error.

For one forward of one MoE layer, of this rank's tokens:
    score/...    [T, E]  what the router made of the logits, without the bias       offset/...  [E]  the bias of that moment
    size/...     [T]     the largest logit, at least 1: rounding grows with it
    chosen/...   [T, E]  which experts the token chose                              served/...  [T, E]  which of them compute it
    lawful/...   [T]     whether the naive rules, given this rank's own scores, choose and serve the same
A router that learns nothing (fixed, hash) has no scores that could be close, and leaves nothing here.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmoe.moe.layer import MoE, MoEOutput
from dmoe.moe.routing import DispatchPlan, Routing
from dmoe.verify.naive.queue import Choices, keep
from dmoe.verify.naive.routing import choose


@contextmanager
def recorded(layers: Sequence[MoE]) -> Iterator[tuple[list[MoEOutput], list[Routing]]]:
    """Record the output and the router's decision of every layer that runs inside.

    A naive layer calls no router, so it adds no decision.
    """
    outputs: list[MoEOutput] = []
    routings: list[Routing] = []

    def record_output(module: object, given: object, output: MoEOutput) -> None:
        outputs.append(output)

    def record_choice(module: object, given: object, output: Routing) -> None:
        routings.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record_output).remove)
            stack.callback(layer.router.register_forward_hook(record_choice).remove)
        yield outputs, routings


def computed(assigned: Routing | DispatchPlan) -> NDArray[np.bool_]:
    """Return which experts compute each token of this rank, [T, E]; for a routing, which it selects."""
    active_TK = (
        assigned.is_selected_TK if isinstance(assigned, Routing) else assigned.is_kept_TK
    )
    computed_TE = torch.zeros(len(active_TK), assigned.num_experts, dtype=torch.bool)
    # one choice at a time: a dropped one must not overwrite a kept one of the same expert
    for k in range(active_TK.shape[1]):
        computed_TE |= torch.zeros_like(computed_TE).scatter_(
            1, assigned.expert_TK[:, k : k + 1], active_TK[:, k : k + 1]
        )
    return computed_TE.numpy()


def witness(
    layer: MoE, output: MoEOutput, choice: Routing | None, sequences: int
) -> dict[str, NDArray[np.generic]]:
    """What the module's docstring lists, by the first part of its key. `choice` is None for a naive layer, which is the rules.

    Collective (one gather of the scores) where all ranks share a capacity.
    """
    if layer.router.config.kind in ("fixed", "hash"):
        return {}
    routing, computed_TE = output.routing, computed(output.plan)
    chosen_TE, served_TE = by_the_rules(layer, routing.score_TE, sequences)
    mine_TE = chosen_TE if choice is None else computed(choice)
    return {
        "score": routing.score_TE.detach().numpy().copy(),
        "offset": layer.router.get_buffer("bias_E").detach().numpy().copy(),
        "size": routing.logit_TE.detach().abs().amax(1).clamp(min=1.0).numpy().copy(),
        "chosen": mine_TE,
        "served": computed_TE,
        "lawful": ((mine_TE == chosen_TE) & (computed_TE == served_TE)).all(1),
    }


def by_the_rules(
    layer: MoE, score_TE: Tensor, sequences: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What the naive rules choose and serve of this rank's tokens, given all the scores that share a capacity with them."""
    tokens, first = len(score_TE), 0
    if layer.capacity.group == "global":
        sequences, first = sequences * layer.comm.size, layer.comm.rank * tokens
        score_TE = layer.comm.gather(score_TE).flatten(0, 1)
    valid = [True] * len(score_TE)  # verify's data has no padding
    experts, spare = choose(layer, score_TE, valid, sequences)
    decision = Choices(experts, spare, score_TE, score_TE, score_TE, valid)
    kept = keep(layer, decision, sequences)
    here = slice(first, first + tokens)
    return decision.mask(score_TE)[here].numpy(), kept.mask(score_TE)[here].numpy()
