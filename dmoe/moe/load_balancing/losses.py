"""The Switch loss: experts should be chosen equally often.

    loss = E * sum over experts e of  f_e * P_e            (Fedus et al. 2021, eq. 4; 1 at perfect balance, for any K)

    f_e = share of the unit's choices that fell on e, before any drop (a count: no gradient)
    P_e = mean over the unit's tokens of the score of e, normalised to sum 1 over the experts

Letters: T tokens, E experts, U units.

The router z-loss: logits should stay small, where float32's softmax is accurate.

    loss = mean over the unit's tokens of  logsumexp(logits)^2            (Zoph et al. 2022, ST-MoE, eq. 5)

Letters: T tokens, E experts, U units.

Two losses on how unequal the experts' scores are, whatever was chosen.

    importance = CV^2 over experts of  sum_t s_te      (Shazeer et al. 2017, eq. 6-7, with CV^2 = population variance / mean^2)
    usage_std  = population standard deviation over experts of  mean_t (s_te / sum_e s_te)

Both are 0 when every expert has the same total. s are the router's scores over all experts, as they are for importance (a common
factor cancels in CV), normalised to sum 1 a token for usage. No collective, no host sync.

Letters: T tokens, E experts, U units.

The load loss: the *number* of tokens an expert gets, made smooth by the router's noise (Shazeer et al. 2017, appendix A).

    loss    = CV^2 over experts of Load_e               (eq. 11)
    Load_e  = sum over tokens of P(x, e)                (eq. 10)
    P(x, e) = Phi((clean_e - kth_excluding(H, K, e)) / std_e)      (eq. 8-9)

P is the probability that e is among the token's K best if only its own noise were drawn again: H are the noisy logits, `clean` the
logits without noise, `std` the noise's standard deviation, Phi the normal distribution function, and kth_excluding(H, K, e) the K-th
largest of H without its e-th entry. With K = E every expert is chosen with certainty: P = 1.

Without noise the load is a count and has no gradient: a router that reports none is refused. In evaluation nothing is drawn (H =
clean), and the noisy router still says how much it would have been. Cost: one sort of [T, E]. No collective, no host sync.

Letters: T tokens, E experts, K experts a token, U units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.moe.comm import DataParallelComm
from dmoe.moe.load_balancing.groups import (
    choice_count,
    fraction,
    masked,
    mean_over_tokens,
    normalized,
    real_tokens,
    squared_variation,
    sum_over_tokens,
)
from dmoe.moe.routing import Noise, Routing


def switch_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit. No collective, no host sync."""
    share_UE = fraction(choice_count(routing, units).to(routing.score_TE.dtype))
    mean_UE = mean_over_tokens(normalized(routing.score_TE), valid_T, units)
    return routing.score_TE.shape[1] * (share_UE * mean_UE).sum(-1)


def switch_loss_global(
    routing: Routing, prior_E: Tensor | None, valid_T: Tensor | None, comm: DataParallelComm
) -> Tensor:
    """Scalar share of the loss whose f and P are taken over the global micro-batch (Qiu et al. 2025, "Demons in the detail").

    f also counts the optimizer step's earlier accumulation steps (`prior_E`). Sum the shares over the ranks to get the loss.
    One all-reduce of E + 1 int64, no host sync.
    """
    num_experts = routing.score_TE.shape[1]
    total = comm.sum(
        torch.cat([choice_count(routing, 1)[0], real_tokens(routing.score_TE, valid_T)])
    )
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


def z_loss(logit_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit. No collective, no host sync."""
    return mean_over_tokens(logit_TE.logsumexp(-1, keepdim=True).square(), valid_T, units).squeeze(
        -1
    )


def z_reference(logit_TE: Tensor, tokens: list[int]) -> float:
    """The loss of one unit, the real tokens given, by loops. For tests."""
    return sum(
        math.log(sum(math.exp(logit) for logit in logit_TE[t].tolist())) ** 2 for t in tokens
    ) / max(1, len(tokens))


def importance_loss(score_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit."""
    return squared_variation(sum_over_tokens(score_TE, valid_T, units))


def usage_std_loss(score_TE: Tensor, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit.

    The square root's slope is infinite at perfect balance; the norm's backward takes 0 there, the middle of its subgradients.
    """
    mean_UE = mean_over_tokens(normalized(score_TE), valid_T, units)
    away_UE = mean_UE - mean_UE.mean(-1, keepdim=True)
    std_U: Tensor = torch.linalg.vector_norm(away_UE, dim=-1) / math.sqrt(score_TE.shape[1])
    return std_U


def importance_reference(score_TE: Tensor, tokens: list[int]) -> float:
    """The importance loss of one unit, the real tokens given, by loops. For tests."""
    return squared_variation_reference(
        [sum(float(score_TE[t, e]) for t in tokens) for e in range(score_TE.shape[1])]
    )


def squared_variation_reference(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2 if mean else 0.0


def usage_std_reference(score_TE: Tensor, tokens: list[int]) -> float:
    """The usage_std loss of one unit, the real tokens given, by loops. For tests."""
    experts = range(score_TE.shape[1])
    usage = [
        sum(float(score_TE[t, e] / score_TE[t].sum()) for t in tokens) / max(1, len(tokens))
        for e in experts
    ]
    mean = sum(usage) / len(usage)
    return math.sqrt(sum((value - mean) ** 2 for value in usage) / len(usage))


def load_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit."""
    if routing.noise is None:
        raise ValueError(
            "balance.load needs the noise of router.kind='noisy'; this router has none"
        )
    chance_TE = smooth_load(routing.logit_TE, routing.noise, routing.expert_TK.shape[1])
    return squared_variation(sum_over_tokens(chance_TE, valid_T, units))


def smooth_load(logit_TE: Tensor, noise: Noise, top_k: int) -> Tensor:
    """P(x, e), [T, E]. Gradient through the clean logits, the standard deviation and the threshold, as in the paper."""
    if top_k == logit_TE.shape[1]:
        return torch.ones_like(logit_TE)
    sorted_TE = logit_TE.sort(dim=-1, descending=True).values
    last_T1, next_T1 = sorted_TE[:, top_k - 1 : top_k], sorted_TE[:, top_k : top_k + 1]
    # without e, the K-th largest is the next one down if e is among the K best, else it is unmoved; equal where e ties with the K-th
    threshold_TE = torch.where(logit_TE >= last_T1, next_T1, last_T1)
    std_TE = noise.std_TE.clamp(
        min=1e-10
    )  # softplus can round to zero, and 0/0 would be the gradient
    chance_TE: Tensor = torch.special.ndtr((noise.clean_TE - threshold_TE) / std_TE)
    return chance_TE


def load_reference(logit_TE: Tensor, noise: Noise, top_k: int, tokens: list[int]) -> float:
    """The loss of one unit, the real tokens given, by loops from the formulas. For tests."""
    num_experts = logit_TE.shape[1]
    load = [0.0] * num_experts
    for t in tokens:
        noisy, clean, std = (
            logit_TE[t].tolist(),
            noise.clean_TE[t].tolist(),
            noise.std_TE[t].tolist(),
        )
        for expert in range(num_experts):
            others = sorted((noisy[e] for e in range(num_experts) if e != expert), reverse=True)
            certain = top_k > len(others)
            away = math.inf if certain else (clean[expert] - others[top_k - 1]) / std[expert]
            load[expert] += 0.5 * (1.0 + math.erf(away / math.sqrt(2.0)))
    return squared_variation_reference(load)
