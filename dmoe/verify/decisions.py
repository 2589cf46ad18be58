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
from dmoe.moe.routing import Routing
from dmoe.verify.naive.queue import Choices, keep
from dmoe.verify.naive.routing import choose


@contextmanager
def recorded(layers: Sequence[MoE]) -> Iterator[tuple[list[Routing], list[Routing]]]:
    """Of every layer that runs meanwhile the routing after its capacity, and before it. A naive layer asks no router: none before."""
    after: list[Routing] = []
    before: list[Routing] = []

    def record_output(module: object, given: object, output: MoEOutput) -> None:
        after.append(output.routing)

    def record_choice(module: object, given: object, output: Routing) -> None:
        before.append(output)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(record_output).remove)
            stack.callback(layer.router.register_forward_hook(record_choice).remove)
        yield after, before


def computed(routing: Routing) -> NDArray[np.bool_]:
    """[T, E] of this rank's tokens: whether expert e computes token t (before a capacity: whether the token chose it)."""
    made_TK = (
        torch.ones_like(routing.expert_TK, dtype=torch.bool)
        if routing.keep_TK is None
        else routing.keep_TK
    )
    kept_TE = torch.zeros_like(routing.score_TE, dtype=torch.bool)
    for k in range(
        made_TK.shape[1]
    ):  # one choice at a time: a dropped choice must not overwrite a kept one of the same expert
        kept_TE |= torch.zeros_like(kept_TE).scatter_(
            1, routing.expert_TK[:, k : k + 1], made_TK[:, k : k + 1]
        )
    return kept_TE.numpy()


def witness(
    layer: MoE, routing: Routing, choice: Routing | None, sequences: int
) -> dict[str, NDArray[np.generic]]:
    """What the module's docstring lists, by the first part of its key. `choice` is None for a naive layer, which is the rules.

    Collective (one gather of the scores) where all ranks share a capacity.
    """
    if layer.router.config.kind in ("fixed", "hash"):
        return {}
    chosen_TE, served_TE = by_the_rules(layer, routing.score_TE, sequences)
    mine_TE = chosen_TE if choice is None else computed(choice)
    return {
        "score": routing.score_TE.detach().numpy().copy(),
        "offset": layer.router.get_buffer("bias_E").detach().numpy().copy(),
        "size": routing.logit_TE.detach().abs().amax(1).clamp(min=1.0).numpy().copy(),
        "chosen": mine_TE,
        "served": computed(routing),
        "lawful": ((mine_TE == chosen_TE) & (computed(routing) == served_TE)).all(1),
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
