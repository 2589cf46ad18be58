"""All auxiliary losses of a layer; the Switch loss and the z-loss of softmax scores together.

The formulas are in `losses.py`. The gradient of these two is written out:

With l the logits of one token, s = softmax(l), n tokens per unit, c_e the assignments of expert e
in the unit, and A their number:

    switch = (E / (A n)) * sum over e of  c_e * sum over t of s_te
    z      = (1 / n)     * sum over t of  lse_t^2,      lse_t = logsumexp(l_t)

    d switch / d l_te = (E / (A n)) * s_te * (c_e - sum over j of c_j s_tj)
    d z      / d l_te = (2 / n) * lse_t * s_te

Both read the scores that the router has computed: no second softmax, in neither direction. A second
derivative is an error: the scores are constants there. Cost: 5 operations forward and 4 backward.
No collective, no host sync.

Letters: T tokens, E experts, U units (they may differ per loss).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.config.schema import BalanceConfig
from dmoe.moe.dispatch import without_autocast
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.load_balancing.losses import (
    importance_loss,
    load_loss,
    num_real_units,
    own_loss,
    switch_loss,
    switch_loss_global,
    usage_std_loss,
    without_padding,
    z_loss,
)
from dmoe.moe.routing import BatchShape, Routing, TokenContext

LOSSES = ("switch", "z", "importance", "load", "usage_std", "own", "pooled")
"""Coefficients in `BalanceConfig`. `bias` is none; `pooled` is in dmoe/hf/pooled_loss.py."""


def coefficients(config: BalanceConfig) -> dict[str, float]:
    """Return the nonzero coefficients by name of the auxiliary loss, always in the same order."""
    return {name: getattr(config, name) for name in LOSSES if getattr(config, name) != 0.0}


def auxiliary_losses(
    routing: Routing,
    config: BalanceConfig,
    context: TokenContext,
    shape: BatchShape,
    comm: DataParallelComm,
    *,
    layer: int,
    micro_batches: int,
) -> dict[str, Tensor]:
    """Compute this rank's share of each auxiliary loss with a nonzero coefficient.

    Args:
        routing: the router's decision, before capacity.
        config: coefficients and the level of the Switch loss.
        context: `valid_T` and `prior_count_LE`.
        shape: number of sequences.
        comm: all data-parallel ranks.
        layer: index into `prior_count_LE`.
        micro_batches: number of units of level `micro_batch` on this rank.

    Returns: scalars by name, unweighted.
    """
    valid_T = context.valid_T
    if valid_T is not None:
        routing = without_padding(routing, valid_T)
    losses: dict[str, Tensor] = {}
    real_units: dict[int, Tensor] = {}
    together = softmax_losses(routing, config, shape, micro_batches)
    for name in coefficients(config):
        if name == "pooled":
            continue
        if name in together:
            losses[name] = _share_of_mean(together[name], comm.size)
            continue
        if name == "switch" and config.switch_level == "global":
            prior_E = None if context.prior_count_LE is None else context.prior_count_LE[layer]
            losses[name] = switch_loss_global(routing, prior_E, valid_T, comm)
            continue
        if name == "switch":
            units = shape.sequences if config.switch_level == "sequence" else micro_batches
            loss_U = switch_loss(routing, valid_T, units)
        elif name == "z":
            loss_U = z_loss(routing.logit_TE, valid_T, micro_batches)
        elif name == "importance":
            loss_U = importance_loss(routing.score_TE, valid_T, micro_batches)
        elif name == "load":
            loss_U = load_loss(routing, valid_T, micro_batches)
        elif name == "own":
            loss_U = own_loss(config, routing, valid_T, micro_batches)
        else:
            loss_U = usage_std_loss(routing.score_TE, valid_T, micro_batches)
        units = len(loss_U)
        if valid_T is None:  # every rank has the same number of units
            losses[name] = _share_of_mean(loss_U, comm.size)
            continue
        if units not in real_units:
            real_units[units] = comm.sum(num_real_units(valid_T, units)).clamp(min=1)
        losses[name] = loss_U.sum() / real_units[units]
    return {n: loss * comm.size for n, loss in losses.items()} if comm.averages else losses


def _share_of_mean(loss_U: Tensor, ranks: int) -> Tensor:
    """Return this rank's share of the mean over the units of all ranks; one unit costs nothing."""
    total, units = (loss_U.view(()) if len(loss_U) == 1 else loss_U.sum()), max(1, len(loss_U))
    return total if units * ranks == 1 else total / (units * ranks)


class Units(NamedTuple):
    """The number of units of each of the two losses; None: that loss is not computed."""

    switch: int | None
    z: int | None


def softmax_losses(
    routing: Routing, config: BalanceConfig, shape: BatchShape, micro_batches: int
) -> dict[str, Tensor]:
    """Compute the losses of each unit, [U], by name; leave those that need another form.

    Computed are losses with a coefficient, of softmax scores without padding (`loss_logit_TE`),
    where every assignment is selected, and not of switch_level `global`.

    Args:
        routing: the router's decision, before capacity.
        config: coefficients and the level of the Switch loss.
        shape: number of sequences.
        micro_batches: number of units of level `micro_batch`.
    """
    logit_TE, score_TE = routing.loss_logit_TE, routing.score_TE
    if logit_TE is None or routing.selected_TK is not None or not len(score_TE):
        return {}
    sequences = shape.sequences if config.switch_level == "sequence" else micro_batches
    has_switch = config.switch != 0.0 and config.switch_level != "global"
    units = Units(sequences if has_switch else None, micro_batches if config.z != 0.0 else None)
    if not any(units):
        return {}
    count_UE = None if units.switch is None else routing.choice_count(units.switch)
    more = (count_UE, units, routing.expert_TK.shape[1])
    pair = _SoftmaxLosses.apply(logit_TE, score_TE.detach(), *more)
    return {name: loss for name, loss in zip(units._fields, pair, strict=True) if loss is not None}


class _SoftmaxLosses(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logit_TE: Tensor,
        score_TE: Tensor,
        count_UE: Tensor | None,
        units: Units,
        top_k: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.units, (tokens, experts), ctx.factor = units, score_TE.shape, 0.0
        switch_U = z_U = lse_UT = None
        if count_UE is not None:
            assert units.switch is not None
            count_UE = count_UE.to(score_TE.dtype)
            per_unit = tokens // units.switch
            ctx.factor = experts / (per_unit * top_k * per_unit)
            sum_UE = score_TE.view(units.switch, per_unit, experts).sum(1)
            switch_U = _dots(sum_UE, count_UE, ctx.factor)
        if units.z is not None:
            lse_UT = logit_TE.logsumexp(-1).view(units.z, -1)
            z_U = _dots(lse_UT, lse_UT, units.z / tokens)
        ctx.save_for_backward(score_TE, count_UE, lse_UT)
        return switch_U, z_U

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        score_TE, count_UE, lse_UT = ctx.saved_tensors
        (switch_U, z_U), grad_TE = grads, None
        tokens, experts = score_TE.shape
        if switch_U is not None:
            slope_UE1 = _scaled(count_UE, switch_U, ctx.factor)
            slope_TE = slope_UE1.view(-1, 1, experts).expand(-1, tokens // len(switch_U), -1)
            grad_TE = torch.ops.aten._softmax_backward_data(
                slope_TE.reshape(tokens, experts), score_TE, -1, score_TE.dtype
            )
        if z_U is not None:
            slope_T1 = (lse_UT * z_U.unsqueeze(1)).view(tokens, 1)
            factor = 2 * len(z_U) / tokens
            if grad_TE is None:
                grad_TE = score_TE * slope_T1 * factor
            else:
                grad_TE = torch.addcmul(grad_TE, score_TE, slope_T1, value=factor)
        return grad_TE, None, None, None, None


def _dots(one_UX: Tensor, two_UX: Tensor, factor: float) -> Tensor:
    """Compute `factor` times the dot product of each pair of rows, [U], in one operation."""
    rows, columns = one_UX.unsqueeze(1), two_UX.unsqueeze(2)
    unread = one_UX.new_empty(1)
    with without_autocast(one_UX):
        return torch.baddbmm(unread, rows, columns, beta=0, alpha=factor).view(-1)


def _scaled(value_UX: Tensor, scale_U: Tensor, factor: float) -> Tensor:
    """Compute `factor * scale * value` of each unit, [U, X, 1], in one operation."""
    unread, columns = value_UX.new_empty(1), value_UX.unsqueeze(2)
    with without_autocast(value_UX):
        return torch.baddbmm(unread, columns, scale_U.view(-1, 1, 1), beta=0, alpha=factor)
