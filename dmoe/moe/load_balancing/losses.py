"""Auxiliary losses of routers, and this rank's share of each.

A loss is one number per unit (a sequence, a micro-batch of one virtual rank, or the global
micro-batch), and the trained loss is its mean over all units. `auxiliary_losses` returns this
rank's share of that mean: the sum of the shares over the data-parallel ranks is the mean. So the
loss of a run is the same number on any number of ranks, and a single process reads the loss itself.
Assignments are counted before any drop; padding counts nowhere, so a unit of padding alone is no
unit: the mean is over the units with a real token, of all ranks. Units are equal, contiguous runs
of tokens.

Switch load-balancing loss: experts should be selected equally often (Fedus et al. 2021, eq. 4; 1 at
perfect balance, for any K).

    loss = E * sum over experts e of  f_e * P_e

    f_e = share of the unit's assignments to e, before any drop (a count: no gradient)
    P_e = mean over the unit's tokens of the score of e, normalized to sum 1 over the experts

Router z-loss: logits should stay small, where float32's softmax is accurate (Zoph et al. 2022,
ST-MoE, eq. 5).

    loss = mean over the unit's tokens of  logsumexp(logits)^2

Importance and usage_std: the experts' scores should be equal, whatever is selected (Shazeer et al.
2017, eq. 6-7).

    importance = CV^2 over experts of  sum_t s_te           (CV^2 = population variance / mean^2)
    usage_std  = population standard deviation over experts of  mean_t (s_te / sum_e s_te)

Smooth load: the number of tokens per expert, made differentiable by the router's noise (Shazeer et
al. 2017, appendix A).

    loss    = CV^2 over experts of Load_e               (eq. 11)
    Load_e  = sum over tokens of P(x, e)                (eq. 10)
    P(x, e) = Phi((clean_e - kth_excluding(H, K, e)) / std_e)      (eq. 8-9)

P is the probability that e is among the token's K best if only its own noise were drawn again: H
are the noisy logits, `clean` the logits without noise, `std` the noise's standard deviation, Phi
the normal distribution function, and kth_excluding(H, K, e) the K-th largest of H without its e-th
entry. With K = E every expert is selected with certainty: P = 1. A router without noise is refused.
In evaluation no noise is drawn (H = clean), and the noisy router still reports its standard
deviation. Cost: one sort of [T, E].

Cost: one all-reduce of E + 1 int64 per layer if `switch_level` is `global`, else no collective.
With a mask of padding, on one rank or several, one all-reduce of one int64 more per level of
unit in use: either every rank passes a mask, or none. No host sync.

Letters: T tokens, E experts, K experts per token, U units on this rank, L MoE layers, X any width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import construct
from dmoe.config.plugins import label
from dmoe.config.schema import BalanceConfig
from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.routing import Noise, Routing, masked


def own_loss(config: BalanceConfig, routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """Ask the loss of the user's own (`balance.kind`) for one value per unit of this rank.

    Raises:
        ConfigError: a result of another shape.
    """
    assert config.kind is not None
    field = "moe.balance.kind"
    loss = construct(config.kind, field, options=config.options, methods=("values",))
    loss_U: Tensor = loss.values(routing, valid_T, units)
    if not isinstance(loss_U, Tensor) or loss_U.shape != (units,):
        shown = list(loss_U.shape) if isinstance(loss_U, Tensor) else type(loss_U).__name__
        allowed = f"gives {shown}; values() must be one per unit, [{units}]"
        raise ConfigError(field, label(config.kind), allowed, "see docs/plugins.md")
    return loss_U


def without_padding(routing: Routing, valid_T: Tensor) -> Routing:
    """Return the routing with scores, logits and noise of padding set to 0, and their gradients.

    Every loss leaves padding out of its sums; this is for what it computes of each token before,
    whose backward would multiply a zero gradient by what a router of one's own has put there.
    """
    noise = routing.noise
    if noise is not None:
        noise = Noise(masked(noise.clean_TE, valid_T), masked(noise.std_TE, valid_T))
    score_TE, logit_TE = masked(routing.score_TE, valid_T), masked(routing.logit_TE, valid_T)
    return replace(routing, score_TE=score_TE, logit_TE=logit_TE, noise=noise)


def num_real_units(valid_T: Tensor, units: int) -> Tensor:
    """Count the units that have a real token, an int64 scalar."""
    return valid_T.view(units, len(valid_T) // max(1, units)).any(1).sum()


def switch_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """Compute the Switch loss of each unit, [U]."""
    count_UE = routing.choice_count(units)
    score_TE = routing.score_TE if routing.sums_to_one else normalized(routing.score_TE)
    if valid_T is None and routing.selected_TK is None and units:
        # f and P divide by what all units have in common
        tokens = len(score_TE) // units
        product_UE = count_UE * sum_over_tokens(score_TE, None, units)
        assignments = tokens * routing.expert_TK.shape[1]
        return product_UE.sum(-1) * (routing.num_experts / max(1, assignments * tokens))
    share_UE = fraction(count_UE.to(score_TE.dtype))
    mean_UE = mean_over_tokens(score_TE, valid_T, units)
    return routing.num_experts * (share_UE * mean_UE).sum(-1)


def switch_loss_global(
    routing: Routing, prior_E: Tensor | None, valid_T: Tensor | None, comm: DataParallelComm
) -> Tensor:
    """Compute this rank's share of the Switch loss over the global micro-batch.

    Qiu et al. 2025, "Demons in the detail". One all-reduce of E + 1 int64, no host sync.

    Args:
        routing: the router's decision, before capacity.
        prior_E: int64, assignments of the optimizer step's earlier accumulation steps, added to f.
        valid_T: bool, False for padding.
        comm: all data-parallel ranks.

    Returns:
        A scalar.
    """
    num_experts, tokens_1 = routing.num_experts, num_real_tokens(routing.score_TE, valid_T)
    total = comm.sum(torch.cat([routing.choice_count()[0], tokens_1]))
    count_E = total[:num_experts] if prior_E is None else total[:num_experts] + prior_E
    score_TE = masked(normalized(routing.score_TE), valid_T)
    mean_E = score_TE.sum(0) / total[num_experts].clamp(min=1)
    return num_experts * (fraction(count_E.to(score_TE.dtype)) * mean_E).sum()


def z_loss(logit_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """Compute the router z-loss of each unit, [U]."""
    square_T1 = logit_TE.logsumexp(-1, keepdim=True).square()
    return mean_over_tokens(square_T1, valid_T, units).squeeze(-1)


def importance_loss(score_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """Compute the importance loss of each unit, [U]."""
    return squared_variation(sum_over_tokens(score_TE, valid_T, units))


def usage_std_loss(score_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """Compute the usage_std loss of each unit, [U].

    The square root's slope is infinite at perfect balance; the norm's backward takes 0 there, the
    middle of its subgradients.
    """
    mean_UE = mean_over_tokens(normalized(score_TE), valid_T, units)
    deviation_UE = mean_UE - mean_UE.mean(-1, keepdim=True)
    std_U: Tensor = torch.linalg.vector_norm(deviation_UE, dim=-1) / math.sqrt(score_TE.shape[1])
    return std_U


def load_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """Compute the smooth load loss of each unit, [U]."""
    if routing.noise is None:
        raise ValueError(
            "balance.load needs the noise of router.kind='noisy'; this router has none"
        )
    probability_TE = smooth_load(routing.logit_TE, routing.noise, routing.expert_TK.shape[1])
    return squared_variation(sum_over_tokens(probability_TE, valid_T, units))


def smooth_load(logit_TE: Tensor, noise: Noise, top_k: int) -> Tensor:
    """Compute P(x, e), [T, E].

    Gradient flows through the clean logits, the standard deviation and the threshold, as in the
    paper.
    """
    if top_k == logit_TE.shape[1]:
        return torch.ones_like(logit_TE)
    sorted_TE = logit_TE.sort(dim=-1, descending=True).values
    last_T1, next_T1 = sorted_TE[:, top_k - 1 : top_k], sorted_TE[:, top_k : top_k + 1]
    # Without e, the K-th largest is the next one down if e is among the K best, else unchanged.
    # Both are equal where e ties with the K-th.
    threshold_TE = torch.where(logit_TE >= last_T1, next_T1, last_T1)
    # softplus can round to zero, and the gradient would be 0/0
    std_TE = noise.std_TE.clamp(min=1e-10)
    probability_TE: Tensor = torch.special.ndtr((noise.clean_TE - threshold_TE) / std_TE)
    return probability_TE


def normalized(score_TE: Tensor) -> Tensor:
    """Scale scores to sum 1 over the experts: softmax scores already do, sigmoid scores do not."""
    return score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)


def fraction(count: Tensor) -> Tensor:
    """Divide counts by their sum; all 0 if nothing was counted."""
    return count / count.sum(-1, keepdim=True).clamp(min=1)


def sum_over_tokens(value_TX: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """Sum over each unit's real tokens, [U, X]."""
    tokens, width = value_TX.shape
    # sizes are explicit: -1 has no meaning for zero tokens
    return masked(value_TX, valid_T).view(units, tokens // max(1, units), width).sum(1)


def mean_over_tokens(value_TX: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """Average over each unit's real tokens, [U, X]; 0 for a unit of padding only."""
    tokens = value_TX.shape[0] // max(1, units)
    sum_UX = sum_over_tokens(value_TX, valid_T, units)
    if valid_T is None:
        return sum_UX / max(1, tokens)
    return sum_UX / valid_T.view(units, tokens).sum(1, keepdim=True).clamp(min=1)


def num_real_tokens(like: Tensor, valid_T: Tensor | None) -> Tensor:
    """Count the tokens that are not padding, int64 [1]; without waiting for the device."""
    number = like.new_full((1,), like.shape[0], dtype=torch.int64)
    return number if valid_T is None else valid_T.sum().view(1)


def squared_variation(value_UE: Tensor) -> Tensor:
    """Compute variance / mean^2 over the experts, of the population, [U]; 0 if all values are 0."""
    mean_U1 = value_UE.mean(-1, keepdim=True)
    return (value_UE - mean_U1).square().mean(-1) / (mean_U1.squeeze(-1).square() + 1e-20)
