"""Routing per sequence or per task: any router applied to another input than the token's vector.

    sequence:  router(mean over the sequence's tokens of x), one decision for all tokens of the
               sequence (SMEAR, Muqeeth et al. 2023)
    task:      router(one-hot label), so its matrix is the table of tasks by modules
               (Polytropon, Ponti et al. 2023)

The mean over a whole sequence reads later tokens, which a causal model must not do. For such a
model use `first=1`, the first token alone. Cost: the router's, on B or T rows.

Letters: T tokens, B sequences, S tokens per sequence, D width, K modules per token, L labels.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.modular.routing.tables import token_labels
from dmoe.moe.routers.base import RouterModule, valid_choices
from dmoe.moe.routers.projection import router_dtype
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext


class PerSequence(RouterModule):
    """One decision per sequence, from the mean of its valid tokens or of the `first` of them."""

    def __init__(self, router: RouterModule, *, first: int | None = None) -> None:
        super().__init__(router.config, router.num_experts, router.top_k, router.layer)
        if first is not None and first < 1:
            raise ConfigError(
                "first",
                first,
                "must be at least 1, or None for all tokens",
                "use 1 for a causal model",
            )
        self.router, self.first = router, first

    def initialize(self, seed: int, layer: int, std: float) -> None:
        self.router.initialize(seed, layer, std)

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        sequences = shape.sequences
        mean_BD = sequence_mean(x_TD, context.valid_T, sequences, self.first)
        routing: Routing = self.router(
            mean_BD, sequence_context(context, sequences), BatchShape(sequences)
        )
        each = len(x_TD) // max(1, sequences)
        expert_TK, selected_TK = routing.expert_TK.repeat_interleave(each, 0), routing.selected_TK
        valid_TK = valid_choices(expert_TK, context)
        if selected_TK is not None:
            selected_TK = selected_TK.repeat_interleave(each, 0)
            valid_TK = selected_TK if valid_TK is None else valid_TK & selected_TK
        return replace(
            routing,
            expert_TK=expert_TK,
            weight_TK=_repeat_per_token(routing.weight_TK, each),
            score_TE=_repeat_per_token(routing.score_TE, each),
            logit_TE=_repeat_per_token(routing.logit_TE, each),
            selected_TK=valid_TK,
            next_expert_TS=None,
            next_weight_TS=None,
            noise=None,
        )


class PerTask(RouterModule):
    """One decision per label: `router` has input width L. Needs `context.label_T`."""

    def __init__(self, router: RouterModule, labels: int) -> None:
        super().__init__(router.config, router.num_experts, router.top_k, router.layer)
        self.router, self.labels = router, labels

    def initialize(self, seed: int, layer: int, std: float) -> None:
        self.router.initialize(seed, layer, std)

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        label_T = token_labels(context, x_TD, "per task")
        routing: Routing = self.router(
            F.one_hot(label_T, self.labels).to(router_dtype(x_TD)), context, shape
        )
        return routing


def sequence_mean(
    x_TD: Tensor, valid_T: Tensor | None, sequences: int, first: int | None = None
) -> Tensor:
    """Average the vectors of each sequence.

    Args:
        x_TD: vectors of B equal sequences.
        valid_T: bool; False marks padding. None: no padding.
        sequences: B.
        first: number of valid tokens per sequence that are averaged. None: all.

    Returns:
        [B, D], at least float32; zero for a sequence without valid tokens.
    """
    each = len(x_TD) // max(1, sequences)  # not -1 in `view`, which is undefined for no sequences
    x_BSD = x_TD.to(router_dtype(x_TD)).view(sequences, each, x_TD.shape[1])
    if valid_T is None:
        return x_BSD[:, :first].mean(1)
    valid_BS1 = valid_T.view(sequences, each, 1)
    if first is not None:
        # not a slice: padding may precede the tokens, as in generation
        valid_BS1 = valid_BS1 & (valid_BS1.cumsum(1) <= first)
    return x_BSD.masked_fill(~valid_BS1, 0.0).sum(1) / valid_BS1.sum(1).clamp(min=1)


def sequence_context(context: TokenContext, sequences: int) -> TokenContext:
    """Return the context in which every sequence is one token.

    Labels and ids are those of its first valid token. It is valid if any of its tokens is.
    """
    valid_T = context.valid_T

    def first_valid(value_T: Tensor | None) -> Tensor | None:
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
        label_T=first_valid(context.label_T),
        token_id_T=first_valid(context.token_id_T),
        valid_T=None
        if valid_T is None
        else valid_T.view(sequences, len(valid_T) // max(1, sequences)).any(1),
    )


def _repeat_per_token(value_BX: Tensor, each: int) -> Tensor:
    """Compute `repeat_interleave` by a view and a copy: its backward is a sum in a fixed order."""
    return value_BX.unsqueeze(1).expand(-1, each, -1).flatten(0, 1)
