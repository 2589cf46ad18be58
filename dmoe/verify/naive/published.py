"""The reference of a published model: transformers' own forward, with capacity written out.

The block and its experts run the code of transformers, in one process: nothing is dispatched, and
none of dmoe's expert computation is called. A dropped choice gets weight 0, which makes its output
and all its gradients 0. Losses and counts are those of the naive layer, from the router's logits.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmoe.config.schema import Config
from dmoe.hf.adapters import Llama4Layer, ZayaLayer
from dmoe.hf.layer import LayerRecord, MoefiedLayer
from dmoe.hf.model import PublishedModel
from dmoe.moe.routing import TokenContext
from dmoe.verify.naive.capacity import Choices, apply_capacity
from dmoe.verify.naive.layer import PriorCounts, as_routing, auxiliary_losses, layer_stats


def install(model: nn.Module, config: Config) -> None:
    """Give the experts of a published model the forward of transformers back."""
    if not isinstance(model, PublishedModel):
        return
    logits: list[Tensor] = []
    for layer in model.moe_layers():
        assert isinstance(layer, MoefiedLayer)
        layer.top_k, layer.capacity = config.moe.top_k, config.moe.capacity
        # the pooled loss is that of transformers, below
        layer.balance = replace(config.moe.balance, pooled=0.0)
        layer.virtual_ranks = config.parallel.virtual_ranks
        experts = layer.experts
        experts.num_experts = layer.num_experts - layer.num_zero_cost
        experts.__class__ = type(experts).__bases__[1]
        if isinstance(layer, Llama4Layer):
            experts.forward = partial(_all_experts, experts.forward, layer.num_experts)
        prior = PriorCounts()
        experts.register_forward_pre_hook(partial(_drop, layer, prior), with_kwargs=True)
        if config.moe.balance.pooled:
            hook = partial(_add_pooled, layer, logits, len(model.moe_layers()))
            experts.register_forward_hook(hook)


def _all_experts(
    forward: Callable[[Tensor], Tensor], num_experts: int, x_TD: Tensor, *choice: Tensor
) -> Tensor:
    """Call the experts of Llama-4 as its block does: all of them, with 0 where not chosen."""
    index_T1, weight_T1 = choice
    inputs = [x_TD * weight_T1 * (index_T1 == e) for e in range(num_experts)]
    return forward(torch.cat(inputs)).view(num_experts, *x_TD.shape).sum(0)


def _drop(
    layer: MoefiedLayer,
    prior: PriorCounts,
    experts: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Set the weights of dropped choices to 0, and record the layer's losses and counts."""
    assert not kwargs
    x, index, weights = args
    expert_TK, weight_TK = index.flatten(0, -2), weights.flatten(0, -2)
    if isinstance(layer, ZayaLayer):  # what skips the layer has weight 0, and is no expert
        expert_TK = expert_TK.where(weight_TK != 0, layer.num_experts - 1)
    context, sequences = layer.record.context, layer.record.sequences
    rows = expert_TK.tolist()
    assert all(len({*row}) == len(row) for row in rows), "a router chose an expert twice"
    choices = _choices(layer, expert_TK, weight_TK, context)
    if context.noise_key is not None:
        before_E = prior.add(context.noise_key[1], choices, layer.num_experts)
        context = replace(context, prior_count_LE=torch.tensor([before_E] * (layer.layer + 1)))
    view = cast(Any, layer)
    kept = apply_capacity(view, choices, sequences)
    kept_TK = torch.tensor([[e in kept.experts_T[t] for e in row] for t, row in enumerate(rows)])
    layer.record.layers.append(
        LayerRecord(
            auxiliary_losses(view, choices, context, sequences),
            layer_stats(view, choices, kept),
            *as_routing(choices, kept, (choices.weight_TE * kept.mask(choices.score_TE)).detach()),
        )
    )
    return (x, index, weights * kept_TK.view_as(weights)), {}


def _add_pooled(layer: MoefiedLayer, logits: list[Tensor], layers: int, *_: object) -> None:
    """Collect each layer's logits; after the last, add the loss of transformers to all layers."""
    from transformers.models.mixtral import modeling_mixtral

    loss_of = cast(Any, modeling_mixtral.load_balancing_loss_func)
    logits.append(layer.__dict__["latest_logits"].reshape(-1, layer.num_experts))
    if len(logits) < layers:
        return
    units, valid_T = layer.virtual_ranks, layer.record.context.valid_T
    found: list[Tensor] = []
    for unit in range(units):
        mask = None if valid_T is None else valid_T.view(units, 1, -1)[unit]
        if mask is None or mask.any():
            rows = tuple(logit_TE.view(units, -1, layer.num_experts)[unit] for logit_TE in logits)
            found.append(loss_of(rows, layer.num_experts, layer.top_k, mask))
    for record in layer.record.layers:
        record.aux["pooled"] = torch.stack(found).mean() / layers
    logits.clear()


def _choices(
    layer: MoefiedLayer, expert_TK: Tensor, weight_TK: Tensor, context: TokenContext
) -> Choices:
    tokens = len(expert_TK)
    logit_TE = layer.__dict__["latest_logits"].reshape(tokens, -1)
    valid = [True] * tokens if context.valid_T is None else context.valid_T.tolist()
    rows = expert_TK.tolist()
    zero_TE = torch.zeros(tokens, layer.num_experts, dtype=weight_TK.dtype)
    return Choices(
        experts_T=[rows[t] if valid[t] else [] for t in range(tokens)],
        next_experts_T=[[] for _ in range(tokens)],
        logit_TE=logit_TE,
        score_TE=_scores(layer.facts.score_name, logit_TE),
        weight_TE=zero_TE.scatter(1, expert_TK, weight_TK),
        valid_T=valid,
    )


def _scores(name: str, logit_TE: Tensor) -> Tensor:
    """Compute the scores of all experts by their formula."""
    if name == "softmax":
        power_TE = (logit_TE - logit_TE.detach().amax(1, keepdim=True)).exp()
        return power_TE / power_TE.sum(1, keepdim=True)
    if name == "sigmoid":
        return 1 / (1 + (-logit_TE).exp())
    return (1 + logit_TE.exp()).log().sqrt()
