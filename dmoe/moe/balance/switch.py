"""The Switch loss: experts should be chosen equally often.

    loss = E * sum over experts e of  f_e * P_e            (Fedus et al. 2021, eq. 4; 1 at perfect balance, for any K)

    f_e = share of the unit's choices that fell on e, before any drop (a count: no gradient)
    P_e = mean over the unit's tokens of the score of e, normalised to sum 1 over the experts

Letters: T tokens, E experts, U units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.balance.units import choice_count, fraction, masked, mean_over_tokens, normalized, real_tokens
from dmoe.moe.peers import DataParallelComm
from dmoe.moe.routing import Routing

__all__ = ["switch_loss", "switch_loss_global", "switch_reference"]


def switch_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit. No collective, no host sync."""
    share_UE = fraction(choice_count(routing, units).to(routing.score_TE.dtype))
    mean_UE = mean_over_tokens(normalized(routing.score_TE), valid_T, units)
    return routing.score_TE.shape[1] * (share_UE * mean_UE).sum(-1)


def switch_loss_global(routing: Routing, prior_E: Tensor | None, valid_T: Tensor | None, comm: DataParallelComm) -> Tensor:
    """Scalar share of the loss whose f and P are taken over the global micro-batch (Qiu et al. 2025, "Demons in the detail").

    f also counts the optimizer step's earlier accumulation steps (`prior_E`). Sum the shares over the ranks to get the loss.
    One all-reduce of E + 1 int64, no host sync.
    """
    num_experts = routing.score_TE.shape[1]
    total = comm.sum(torch.cat([choice_count(routing, 1)[0], real_tokens(routing.score_TE, valid_T)]))
    count_E = total[:num_experts] if prior_E is None else total[:num_experts] + prior_E
    score_TE = masked(normalized(routing.score_TE), valid_T)
    mean_E = score_TE.sum(0) / total[num_experts].clamp(min=1)
    return num_experts * (fraction(count_E.to(score_TE.dtype)) * mean_E).sum()


def switch_reference(routing: Routing, tokens: list[int], prior: list[int] | None = None) -> float:
    """The loss of one unit, the real tokens given, by loops. For tests. `routing.keep_TK` says which choices were made."""
    num_experts = routing.score_TE.shape[1]
    counts = [0] * num_experts if prior is None else list(prior)
    for t in tokens:
        for k, expert in enumerate(routing.expert_TK[t].tolist()):
            counts[expert] += routing.keep_TK is None or bool(routing.keep_TK[t, k])
    loss = 0.0
    for expert in range(num_experts):
        shares = [float(routing.score_TE[t, expert] / routing.score_TE[t].sum()) for t in tokens]
        loss += counts[expert] / max(1, sum(counts)) * sum(shares) / max(1, len(tokens))
    return num_experts * loss
