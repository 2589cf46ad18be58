"""Routing by sequence or by task instead of by token: any router, asked about something else than the token's vector.

    sequence:  router(mean over the sequence's tokens of x), one decision for all tokens of the sequence (SMEAR, Muqeeth et al. 2023)
    task:      router(one-hot label), so its matrix is the table of tasks by modules (Polytropon, Ponti et al. 2023)

A mean over the whole sequence looks at later tokens, which a causal model must not at training time and cannot at generation: there
take `first=1`, the first token alone. Cost: the router's, on B or T rows.

Letters: T tokens, B sequences, S tokens a sequence, D width, K modules a token, L labels.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.modular.routing.tables import token_labels
from dmoe.moe.routers.base import RouterModule, router_dtype, valid_choices
from dmoe.moe.routing import Routing, TokenContext


class PerSequence(RouterModule):
    """One decision a sequence, by the mean of its valid tokens' vectors, or of its `first` tokens only."""

    def __init__(self, router: RouterModule, *, first: int | None = None) -> None:
        super().__init__(router.config, router.num_experts, router.top_k, router.layer)
        if first is not None and first < 1:
            raise ConfigError(
                "first",
                first,
                "must be at least 1, or none for all tokens",
                "use 1 for a causal model",
            )
        self.router, self.first = router, first

    def initialize(self, seed: int, layer: int, std: float) -> None:
        self.router.initialize(seed, layer, std)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        mean_BD = sequence_mean(x_TD, context.valid_T, context.sequences, self.first)
        routing: Routing = self.router(mean_BD, sequence_context(context))
        each = len(x_TD) // max(1, context.sequences)
        expert_TK, keep_TK = routing.expert_TK.repeat_interleave(each, 0), routing.keep_TK
        made_TK = valid_choices(expert_TK, context)
        if keep_TK is not None:
            keep_TK = keep_TK.repeat_interleave(each, 0)
            made_TK = keep_TK if made_TK is None else made_TK & keep_TK
        return replace(
            routing,
            expert_TK=expert_TK,
            weight_TK=_repeat_per_token(routing.weight_TK, each),
            score_TE=_repeat_per_token(routing.score_TE, each),
            logit_TE=_repeat_per_token(routing.logit_TE, each),
            keep_TK=made_TK,
            next_expert_TS=None,
            next_weight_TS=None,
            noise=None,
        )


class PerTask(RouterModule):
    """One decision a label: `router` is made for tokens of width L. Needs `context.label_T`."""

    def __init__(self, router: RouterModule, labels: int) -> None:
        super().__init__(router.config, router.num_experts, router.top_k, router.layer)
        self.router, self.labels = router, labels

    def initialize(self, seed: int, layer: int, std: float) -> None:
        self.router.initialize(seed, layer, std)

    def forward(self, x_TD: Tensor, context: TokenContext) -> Routing:
        label_T = token_labels(context, x_TD, "per task")
        routing: Routing = self.router(
            F.one_hot(label_T, self.labels).to(router_dtype(x_TD)), context
        )
        return routing


def sequence_mean(
    x_TD: Tensor, valid_T: Tensor | None, sequences: int, first: int | None = None
) -> Tensor:
    """[B, D], at least float32: the mean over each sequence's valid tokens (the `first` of them); zero where it has none."""
    each = len(x_TD) // max(1, sequences)  # spelled out: -1 has no meaning for no sequences
    x_BSD = x_TD.to(router_dtype(x_TD)).view(sequences, each, x_TD.shape[1])
    if valid_T is None:
        return x_BSD[:, :first].mean(1)
    valid_BS1 = valid_T.view(sequences, each, 1)
    if first is not None:  # padding may stand in front, as it does for generation
        valid_BS1 = valid_BS1 & (valid_BS1.cumsum(1) <= first)
    return x_BSD.masked_fill(~valid_BS1, 0.0).sum(1) / valid_BS1.sum(1).clamp(min=1)


def sequence_context(context: TokenContext) -> TokenContext:
    """What is known of the sequences: the label of the first valid token; valid where any is. Every sequence is a "token" here."""
    sequences, valid_T = context.sequences, context.valid_T

    def of_first(value_T: Tensor | None) -> Tensor | None:
        if value_T is None:
            return None
        value_BS = value_T.view(sequences, len(value_T) // max(1, sequences))
        if valid_T is None or not value_BS.numel():
            return value_BS[:, 0] if value_BS.numel() else value_T
        return value_BS.gather(
            1, valid_T.view(value_BS.shape).int().argmax(1, keepdim=True)
        ).squeeze(1)

    return replace(
        context,
        label_T=of_first(context.label_T),
        token_id_T=of_first(context.token_id_T),
        valid_T=None
        if valid_T is None
        else valid_T.view(sequences, len(valid_T) // max(1, sequences)).any(1),
        capacity=None,
        groups=1,
    )


def _repeat_per_token(value_BX: Tensor, each: int) -> Tensor:
    """`repeat_interleave` as a view and a copy: its backward is a sum, in a fixed order."""
    return value_BX.unsqueeze(1).expand(-1, each, -1).flatten(0, 1)


def sequence_mean_reference(
    x_TD: Tensor, valid_T: Tensor | None, sequences: int, first: int | None = None
) -> list[list[float]]:
    """One sequence and token at a time. For tests."""
    each = len(x_TD) // sequences
    means = []
    for b in range(sequences):
        tokens = [
            t for t in range(b * each, (b + 1) * each) if valid_T is None or bool(valid_T[t])
        ][:first]
        totals = [sum(float(x_TD[t, d]) for t in tokens) for d in range(x_TD.shape[1])]
        means.append([total / max(1, len(tokens)) for total in totals])
    return means
