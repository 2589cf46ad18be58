"""Base classes of routers, and the steps that learned routers share.

    logit    = x W^T
    score    = softmax(logit) | sigmoid(logit)
    selected = the K largest of score + bias
    weight   = score of the selected, renormalized, scaled

The bias affects the selection, never the weights (Wang et al. 2024, DeepSeek-V3).

In training, Switch's jitter may multiply the router's input by uniform noise in [1 - jitter, 1 +
jitter] (Fedus et al. 2021, 2.4).

Next experts, for `capacity.overflow: next_choice`: an assignment that overflows is offered to the
token's next eligible expert, at the weight that expert would have:

    weights_from: all      score[next] / (sum of the selected scores, if renormalized)
    weights_from: chosen   exp(logit[next]) / sum over the selected of exp(logit)

times `scale`: the rule and the denominator of the selected ones. So a token's weights need not sum
to 1 after rerouting or a drop. Computed only with a capacity: without one nothing overflows.

Cost: one [T, D] x [D, E] product, one sort of E values per token, a few operations on [T, K]. No
collective, no host sync.

Letters: T tokens, D width, E experts, K experts per token, S next experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dmoe.config.router_kinds import RouterSpec
from dmoe.config.schema import RouterConfig
from dmoe.moe.rng import keyed_noise, normal_
from dmoe.moe.routers.projection import project, renormalized_softmax, router_dtype
from dmoe.moe.routing import BatchShape, Routing, TokenContext


class RouterModule(nn.Module):
    """A router. `forward` makes no collective and no host read: shapes follow from shapes alone.

    Args:
        config: section `moe.router`.
        num_experts: E.
        top_k: K.
        layer: index among the MoE layers.
    """

    spec: ClassVar[RouterSpec | None] = None  # of a router of the user's own: its properties

    def __init__(self, config: RouterConfig, num_experts: int, top_k: int, layer: int = 0) -> None:
        super().__init__()
        self.config, self.num_experts, self.layer = config, num_experts, layer
        self.top_k = top_k
        """Experts per token: exactly, at most (adaptive, budget) or on average (expert_choice)."""

    def initialize(self, seed: int, layer: int, std: float) -> None:
        """Draw the weights; a no-op for a router without parameters."""

    def set_expert_costs(self, multiply_adds: Sequence[int]) -> None:
        """Set the multiply-adds of a row with each expert; used by routers with a budget only."""

    def forward(self, x_TD: Tensor, context: TokenContext, shape: BatchShape) -> Routing:
        """Route tokens [T, D]; see `Routing`."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> RouterModule:
        """Move and cast like any module, but keep the router's own buffers at least float32.

        In bf16 a bias of 0.5 loses steps of 0.001.
        """
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self._narrow_buffers():
            self._buffers[name] = before[name].to(buffer.device, router_dtype(buffer))
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load like any module; `assign=True` takes over the file's dtype, too narrow or not."""
        super()._load_from_state_dict(*args)
        for name, buffer in self._narrow_buffers():
            self._buffers[name] = buffer.to(router_dtype(buffer))

    def _narrow_buffers(self) -> list[tuple[str, Tensor]]:
        """List the router's own buffers of floating point below float32."""
        return [
            (name, buffer)
            for name, buffer in self.named_buffers(recurse=False)
            if buffer.is_floating_point() and router_dtype(buffer) != buffer.dtype
        ]


class LearnedRouter(RouterModule):
    """A router with logits from one matrix, and a bias for the selection.

    Logits, scores and weights are float32 whatever the model's precision (ST-MoE, "selective
    precision"), float64 in a float64 model. Ties go to the lower expert id on every device.
    """

    bias_E: Tensor
    """float32 or float64. Saved with the weights; updated once per step by the bias controller,
    never by the optimizer."""

    def __init__(
        self, config: RouterConfig, dim: int, num_experts: int, top_k: int, layer: int = 0
    ) -> None:
        super().__init__(config, num_experts, top_k, layer)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        dtype = router_dtype(self.weight)  # not the default dtype, which may be bfloat16
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=dtype))

    def initialize(self, seed: int, layer: int, std: float) -> None:
        normal_(self.weight, std, seed, "router", layer)
        self.bias_E.zero_()

    def router_input(self, x_TD: Tensor, context: TokenContext, shape: BatchShape) -> Tensor:
        """Return the input in float32 or float64, with jitter in training."""
        x_TD = x_TD.to(router_dtype(x_TD))
        if not (self.training and self.config.jitter):
            return x_TD
        uniform_TD = keyed_noise(
            torch.rand, "jitter", x_TD, x_TD.shape[1], self.layer, context, shape
        )
        return x_TD * (1 + self.config.jitter * (2 * uniform_TD - 1))

    def logits(self, x_TD: Tensor, context: TokenContext, shape: BatchShape) -> Tensor:
        """Return the logits, float [T, E]."""
        return project(self.router_input(x_TD, context, shape), self.weight)

    def select(
        self, logit_TE: Tensor, score_TE: Tensor, context: TokenContext, shape: BatchShape
    ) -> Routing:
        """Select experts by the gate's scores and the bias: of a forward, or recorded ones."""
        return self.route(logit_TE, score_TE, context, shape)

    def route(
        self,
        logit_TE: Tensor,
        score_TE: Tensor,
        context: TokenContext,
        shape: BatchShape,
        *,
        eligible_TE: Tensor | None = None,
    ) -> Routing:
        """Select the K experts of largest score + bias.

        Args:
            logit_TE, score_TE: float32 or float64; the gate's scores of them.
            context: `valid_T`.
            shape: `capacity`; next experts are computed only with one.
            eligible_TE: bool, at least K per token. None: all experts.
        """
        order_TE = sort_experts(score_TE.detach() + self.bias_E, eligible_TE)
        expert_TK = order_TE[:, : self.top_k]
        rule = (logit_TE, score_TE, expert_TK, self.config)
        weight_TK, loss_logit_TE = weights_and_logits(*rule)
        routing = Routing(
            expert_TK,
            weight_TK,
            score_TE,
            logit_TE,
            scale=self.config.scale,
            selected_TK=valid_choices(expert_TK, context),
            sums_to_one=self.config.score == "softmax",
        ).with_loss_logits(loss_logit_TE)
        if shape.capacity is None:
            return routing
        next_TS = order_TE[:, self.top_k : 2 * self.top_k]
        exists_TS = None if eligible_TE is None else eligible_TE.gather(1, next_TS)
        return with_next_experts(routing, next_TS, self.config, exists_TS=exists_TS)


def weights_and_logits(
    logit_TE: Tensor,
    score_TE: Tensor,
    expert_TK: Tensor,
    config: RouterConfig,
    mask_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `combine_weights`, and `Routing.loss_logit_TE` where the scores are a softmax."""
    if config.score != "softmax" or mask_TK is not None:
        return combine_weights(logit_TE, score_TE, expert_TK, config, mask_TK), None
    if config.weights_from == "chosen" or not config.renormalize:
        return combine_weights(logit_TE, score_TE, expert_TK, config), logit_TE
    weight_TK, loss_logit_TE = renormalized_softmax(logit_TE, score_TE, expert_TK)
    return _scaled(weight_TK, config), loss_logit_TE


def valid_choices(expert_TK: Tensor, context: TokenContext) -> Tensor | None:
    """Return the mask of real tokens, bool [T, K]; None without padding, which saves masks."""
    return None if context.valid_T is None else context.valid_T.unsqueeze(1).expand_as(expert_TK)


def gate_scores(logit_TE: Tensor, config: RouterConfig) -> Tensor:
    """Apply the gate of `config.score`, softmax or sigmoid."""
    return logit_TE.softmax(-1) if config.score == "softmax" else logit_TE.sigmoid()


def sort_experts(score_TE: Tensor, eligible_TE: Tensor | None = None) -> Tensor:
    """Sort experts by descending score, ties to the lower id, ineligible ones last; int64 [T, E].

    The sort is stable on CPU and CUDA; `torch.topk` promises no order among ties.
    """
    if eligible_TE is not None:
        score_TE = score_TE.masked_fill(~eligible_TE, -math.inf)
    return score_TE.sort(dim=-1, descending=True, stable=True).indices


def top_k_stable(score_TE: Tensor, top_k: int) -> Tensor:
    """Return the K largest of each row in descending order, ties to the lower id; int64 [T, K]."""
    return sort_experts(score_TE)[:, :top_k]


def combine_weights(
    logit_TE: Tensor,
    score_TE: Tensor,
    expert_TK: Tensor,
    config: RouterConfig,
    selected_TK: Tensor | None = None,
) -> Tensor:
    """Compute the combine weights of the selected experts, [T, K], in the dtype of the scores.

    `weights_from: chosen` takes the softmax over the K selected logits (Megatron's default),
    otherwise the scores over all E are used; `renormalize` divides by the selected sum (+1e-20);
    `scale` multiplies last.

    Args:
        logit_TE, score_TE: float32 or float64; the gate's scores of them.
        expert_TK: int64, the experts listed for each token.
        config: weights_from, score, renormalize, scale.
        selected_TK: bool; the weight is 0 where False. None: all are selected.
    """
    if config.weights_from == "chosen":
        selected_logit_TK = logit_TE.gather(1, expert_TK)
        if selected_TK is not None:
            selected_logit_TK = selected_logit_TK.masked_fill(~selected_TK, -math.inf)
        weight_TK = gate_scores(selected_logit_TK, config)
    else:
        weight_TK = _selected_scores(score_TE, expert_TK, selected_TK)
    if config.renormalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return _scaled(weight_TK, config)


def _scaled(weight_TK: Tensor, config: RouterConfig) -> Tensor:
    return weight_TK if config.scale == 1.0 else weight_TK * config.scale


def with_next_experts(
    routing: Routing,
    next_TS: Tensor,
    config: RouterConfig,
    *,
    exists_TS: Tensor | None = None,
    selected_TK: Tensor | None = None,
) -> Routing:
    """Return `routing` with next experts and the weights they would have.

    Args:
        next_TS: int64, next experts, best first.
        exists_TS: bool; id -1 and weight 0 where False. None: all exist.
        selected_TK: bool, the experts of the list that are selected (adaptive). None: all.
    """
    weight_TS = next_weights(routing, next_TS, config, selected_TK)
    if exists_TS is not None:
        next_TS = next_TS.masked_fill(~exists_TS, -1)
        weight_TS = weight_TS.masked_fill(~exists_TS, 0.0)
    routing_with = replace(routing, next_expert_TS=next_TS, next_weight_TS=weight_TS)
    return routing_with.with_loss_logits(routing.loss_logit_TE)


def next_weights(
    routing: Routing, next_TS: Tensor, config: RouterConfig, selected_TK: Tensor | None
) -> Tensor:
    """Compute the weights that the next experts would have, [T, S]; see `with_next_experts`."""
    if config.score == "softmax" and config.weights_from == "chosen":
        logit_TK = routing.logit_TE.gather(1, routing.expert_TK)
        if selected_TK is not None:
            logit_TK = logit_TK.masked_fill(~selected_TK, -math.inf)
        next_logit_TS = routing.logit_TE.gather(1, next_TS)
        # The selected weights sum to 1 already, so there is nothing to renormalize. With a bias a
        # next logit may be far above them: the clamp keeps infinity out of the backward of `exp`.
        above_TS = next_logit_TS - logit_TK.logsumexp(-1, keepdim=True)
        return above_TS.clamp(max=math.log(torch.finfo(above_TS.dtype).max)).exp() * config.scale
    weight_TS = routing.score_TE.gather(1, next_TS)
    if config.renormalize:
        score_TK = _selected_scores(routing.score_TE, routing.expert_TK, selected_TK)
        weight_TS = weight_TS / (score_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TS * config.scale


def _selected_scores(score_TE: Tensor, expert_TK: Tensor, selected_TK: Tensor | None) -> Tensor:
    score_TK = score_TE.gather(1, expert_TK)
    return score_TK if selected_TK is None else score_TK.masked_fill(~selected_TK, 0.0)
