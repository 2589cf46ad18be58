"""The load loss: the *number* of tokens an expert gets, made smooth by the router's noise (Shazeer et al. 2017, appendix A).

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

from dmoe.moe.balance.spread import squared_variation_reference
from dmoe.moe.balance.units import squared_variation, sum_over_tokens
from dmoe.moe.routing import Noise, Routing

__all__ = ["load_loss", "load_reference", "smooth_load"]


def load_loss(routing: Routing, valid_T: Tensor | None, units: int) -> Tensor:
    """[U]: the loss of each unit."""
    if routing.noise is None:
        raise ValueError("balance.load needs the noise of router.kind='noisy'; this router has none")
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
    std_TE = noise.std_TE.clamp(min=1e-10)  # softplus can round to zero, and 0/0 would be the gradient
    chance_TE: Tensor = torch.special.ndtr((noise.clean_TE - threshold_TE) / std_TE)
    return chance_TE


def load_reference(logit_TE: Tensor, noise: Noise, top_k: int, tokens: list[int]) -> float:
    """The loss of one unit, the real tokens given, by loops from the formulas. For tests."""
    num_experts = logit_TE.shape[1]
    load = [0.0] * num_experts
    for t in tokens:
        noisy, clean, std = logit_TE[t].tolist(), noise.clean_TE[t].tolist(), noise.std_TE[t].tolist()
        for expert in range(num_experts):
            others = sorted((noisy[e] for e in range(num_experts) if e != expert), reverse=True)
            certain = top_k > len(others)
            away = math.inf if certain else (clean[expert] - others[top_k - 1]) / std[expert]
            load[expert] += 0.5 * (1.0 + math.erf(away / math.sqrt(2.0)))
    return squared_variation_reference(load)
