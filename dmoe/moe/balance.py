"""Auxiliary losses that keep the experts in use.

Each function returns this rank's *share*: summed over the data ranks, the shares are the mean of the loss over its units (sequences,
micro-batches, or the one global micro-batch). So the loss of a run is the same number on any number of ranks, and a single process
reads the loss itself. Choices are counted before any drop; padding counts nowhere.

Letters: T tokens, E experts, K experts a token, U units on this rank, S = T/U tokens a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config.schema import BalanceConfig
from dmoe.moe.peers import Peers
from dmoe.moe.routing import Routing, TokenContext

__all__ = ["auxiliary_losses", "choice_count", "coefficients", "switch_loss", "switch_loss_global", "z_loss"]


def coefficients(config: BalanceConfig) -> dict[str, float]:
    """The auxiliary losses in force and their coefficients, by name."""
    return {name: value for name, value in (("switch", config.switch), ("z", config.z)) if value != 0.0}


def auxiliary_losses(
    routing: Routing,
    config: BalanceConfig,
    context: TokenContext,
    peers: Peers,
    *,
    layer: int,
    micro_batches: int,
) -> dict[str, Tensor]:
    """This rank's share of each loss in force, unweighted, by name. One all-reduce if `switch_level` is `global`, else none."""
    losses = {}
    if config.switch:
        if config.switch_level == "global":
            prior_E = None if context.prior_count_LE is None else context.prior_count_LE[layer]
            losses["switch"] = switch_loss_global(routing, prior_E, context.valid_T, peers)
        else:
            units = context.sequences if config.switch_level == "sequence" else micro_batches
            losses["switch"] = switch_loss(routing, context.valid_T, units).sum() / (units * peers.size)
    if config.z:
        losses["z"] = z_loss(routing.logit_TE, context.valid_T, micro_batches).sum() / (micro_batches * peers.size)
    return losses


def choice_count(routing: Routing, units: int) -> Tensor:
    """int64 [U, E]: how many choices of each unit fell on each expert, before any drop. Integer atomics only: deterministic."""
    tokens, num_experts = routing.score_TE.shape
    unit_T1 = torch.arange(tokens, device=routing.expert_TK.device).unsqueeze(1) // max(1, tokens // units)
    index_N = (unit_T1 * num_experts + routing.expert_TK).flatten()
    made_N = torch.ones_like(index_N) if routing.keep_TK is None else routing.keep_TK.flatten().to(torch.int64)
    return (
        torch.zeros(units * num_experts, dtype=torch.int64, device=index_N.device)
        .scatter_add_(0, index_N, made_N)
        .view(units, -1)
    )


def switch_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: `E * sum_e f_e P_e` of each unit (Fedus et al. 2021, eq. 4, for any K: 1 at perfect balance).

    f_e = share of the unit's choices that fell on e (no gradient), P_e = mean over its tokens of the score, normalised over E.
    """
    share_UE = fraction(choice_count(routing, units).to(routing.score_TE.dtype))
    mean_UE = mean_over_tokens(normalized(routing.score_TE), valid_T, units)
    return routing.score_TE.shape[1] * (share_UE * mean_UE).sum(-1)


def switch_loss_global(routing: Routing, prior_E: Tensor | None, valid_T: Tensor | None, peers: Peers) -> Tensor:
    """Scalar share of the switch loss whose f and P are taken over the global micro-batch (Qiu et al. 2025, "Demons in the detail").

    f also counts the optimizer step's earlier accumulation steps (`prior_E`). Sum the shares over the ranks to get the loss.
    """
    tokens, num_experts = routing.score_TE.shape
    valid = torch.tensor(tokens, device=routing.expert_TK.device) if valid_T is None else valid_T.sum()
    total = peers.sum(torch.cat([choice_count(routing, 1)[0], valid.view(1)]))
    count_E = total[:num_experts] if prior_E is None else total[:num_experts] + prior_E
    score_TE = masked(normalized(routing.score_TE), valid_T)
    mean_E = score_TE.sum(0) / total[num_experts].clamp(min=1)
    return num_experts * (fraction(count_E.to(score_TE.dtype)) * mean_E).sum()


def z_loss(logit_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: mean over a unit's tokens of `logsumexp(logits)^2` (Zoph et al. 2022, ST-MoE eq. 5)."""
    return mean_over_tokens(logit_TE.logsumexp(-1, keepdim=True).square(), valid_T, units).squeeze(-1)


def normalized(score_TE: Tensor) -> Tensor:
    """Scores that sum to 1 over the experts: softmax already does, sigmoid does not."""
    return score_TE / (score_TE.sum(-1, keepdim=True) + 1e-20)


def fraction(count: Tensor) -> Tensor:
    return count / count.sum(-1, keepdim=True).clamp(min=1)


def masked(value_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    return value_TX if valid_T is None else value_TX.masked_fill(~valid_T.unsqueeze(1), 0.0)


def mean_over_tokens(value_TX: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U, X]: the mean over each unit's real tokens; 0 for a unit of padding only."""
    sum_UX = masked(value_TX, valid_T).view(units, -1, value_TX.shape[1]).sum(1)
    if valid_T is None:
        return sum_UX / max(1, value_TX.shape[0] // units)
    return sum_UX / valid_T.view(units, -1).sum(1, keepdim=True).clamp(min=1)
