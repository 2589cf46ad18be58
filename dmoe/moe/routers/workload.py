"""Forced routing: the synthetic workloads W0 to W7, to measure what an uneven load costs.

Token n of the global batch of a step has the assignments a = n K + k + shift, k = 0 .. K-1; `shift`
is a hash of (seed, layer, step). With R = `router.ranks`, H = E / R experts in the hot set, and h =
`router.hot` (as a fraction of a denominator up to 1000), a share p = h / R of all assignments is
hot, evenly spread:

    c(a) = floor(a p);   assignment a is hot where c(a + 1) > c(a)
    its expert = order(c(a) mod H) if it is hot, else order(H + (a - c(a)) mod (E - H))

so that in any run of consecutive tokens each hot expert has h times, and each other one (R - h) /
(R - 1) times the mean, to the row, and a token has K distinct experts (h K <= E). Nothing depends
on W, EP, the micro-batch or the rank. `order` lists the experts with the hot set first; s is a
hash of (seed, layer), i an expert's place in `order`:

    W0 balanced       order(a mod E), order(i) = i: every expert alike
    W1 hot set        a permutation drawn for (seed, layer): experts of any rank
    W2 hot rank       ((s mod R) H + i) mod E: the consecutive experts of one of R ranks
    W3 spread hot     (s + (i mod H) R + floor(i / H)) mod E: as hot as W2, over as many ranks as
                      can be
    W4 ragged sources W0 of the tokens that choose: sequence b has the first (b mod R + 1) / R of
                      its tokens choose, the others nothing (one sequence per rank: rank r sends
                      r + 1 parts of R)
    W5 empty rank     W2, but the hot set gets nothing
    W6 rotating       W2 with s + floor(step / 3) in place of s: the hot rank moves every 3 steps
    W7 burst          W2 in steps 3, 8, 13, ..., W0 in all others

They have the names, and isolate the variables, of Megatron-LM's token-imbalance benchmark (pull
request 7488, 2026), where W4 to W7 use random draws. Weights are 1/K, scores as in `static.py`; a
token that chooses nothing has scores 1/E. In evaluation without a `noise_key`, seed and step are 0.
Cost: a few integers per assignment. No collective, no host sync.

Letters: T tokens, E experts, K experts per token, S tokens per sequence.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.moe.rng import generator, key_hash
from dmoe.moe.routers.static import StaticRouter, equal_weights
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, Routing, TokenContext

SHIFT_BITS = 20
BURST_PERIOD, BURST_STEP, ROTATION = 5, 3, 3
"""W7: one step of five is a burst. W6: steps that a hot rank stays."""


class WorkloadRouter(StaticRouter):
    """Selects the experts that a workload gives to each token of the global batch."""

    def forward(
        self, x_TD: Tensor, context: TokenContext, shape: BatchShape = ONE_SEQUENCE
    ) -> Routing:
        """Raise ConfigError in training without `context.noise_key`."""
        if context.noise_key is None and self.training:
            allowed = "a workload changes with seed and step, and needs them in training"
            fix = "pass TokenContext(noise_key=(seed, step)), or call .eval()"
            raise ConfigError("noise_key", None, allowed, fix)
        seed, step = context.noise_key or (0, 0)
        tokens = len(x_TD) // max(1, shape.sequences)
        token_T = torch.arange(len(x_TD), device=x_TD.device) + context.first_sequence * tokens
        chooses_T = None
        if self.config.workload == "W4":
            token_T, chooses_T = ragged_tokens(token_T, max(1, tokens), self.config.ranks)
        expert_TK = self.experts(token_T, seed, step)
        routing = equal_weights(expert_TK, x_TD, self.num_experts, self.config.scale, context)
        if chooses_T is None:
            return routing
        score_TE = routing.score_TE.where(chooses_T.unsqueeze(1), 1 / self.num_experts)
        if context.valid_T is not None:
            chooses_T = chooses_T & context.valid_T
        selected_TK = chooses_T.unsqueeze(1).expand_as(expert_TK)
        return replace(routing, selected_TK=selected_TK, score_TE=score_TE)

    def experts(self, token_T: Tensor, seed: int, step: int) -> Tensor:
        """Return the experts of each token, int64 [T, K], distinct per token.

        Args:
            token_T: int64, index in the global batch.
            seed: of the run.
            step: optimizer step, from 0.
        """
        config, count, ranks = self.config, self.num_experts, self.config.ranks
        kind = config.workload
        burst = kind == "W7" and step % BURST_PERIOD == BURST_STEP
        shift = key_hash(seed, "workload", self.layer, step) % (1 << SHIFT_BITS)
        choice_K = torch.arange(self.top_k, device=token_T.device)
        index_TK = token_T.unsqueeze(1) * self.top_k + choice_K + shift
        if kind in ("W0", "W4") or (kind == "W7" and not burst):
            return index_TK % count
        start, size = key_hash(seed, "hot", self.layer), count // ranks
        if kind == "W5":
            place_TK = size + index_TK % (count - size)
        else:
            share = hot_share(config.hot, ranks)
            before_TK = index_TK * share.numerator // share.denominator
            after_TK = (index_TK + 1) * share.numerator // share.denominator
            cold_TK = size + (index_TK - before_TK) % max(1, count - size)
            place_TK = torch.where(after_TK > before_TK, before_TK % size, cold_TK)
        if kind == "W1":
            drawn = generator(seed, "hot set", self.layer)
            order_E = torch.randperm(count, generator=drawn, device="cpu")
            return order_E.to(token_T.device)[place_TK]
        if kind == "W3":
            return (start % count + place_TK % size * ranks + place_TK // size) % count
        hot_rank = start + (step // ROTATION if kind == "W6" else 0)
        return (hot_rank % ranks * size + place_TK) % count


def hot_share(hot: float, ranks: int) -> Fraction:
    """Return the share p of all assignments that goes to the hot set."""
    return Fraction(hot).limit_denominator(1000) / ranks


def ragged_tokens(token_T: Tensor, length: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return W4's index of each token among those that choose, and whether it is one of them.

    Args:
        token_T: int64, index in the global batch.
        length: S.
        ranks: R.
    """
    length_R = (torch.arange(ranks, device=token_T.device) + 1) * length // ranks
    sequence_T, position_T = token_T // length, token_T % length
    rank_T = sequence_T % ranks
    before_R = length_R.cumsum(0) - length_R
    before_T = sequence_T // ranks * length_R.sum() + before_R[rank_T]
    return before_T + position_T, position_T < length_R[rank_T]
