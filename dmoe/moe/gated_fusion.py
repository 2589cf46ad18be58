"""Gated fusion: a gate for each element, read from all streams together (Arevalo et al. 2017, "Gated Multimodal Units").

    two streams:   g = sigmoid([f_1 | f_2] G + c),                     y = g * f_1 + (1 - g) * f_2
    S streams:     g = softmax over s of ([f_1 | ... | f_S] G_s + c_s),   y = sum_s g_s * f_s

The last stream's logit is 0, which makes the softmax of two exactly the sigmoid. A stream that is missing is left out of the softmax,
and the others share its part. G and c that are zero give the mean.
Cost: 2 S (S-1) W^2 FLOPs a token and T * S * W numbers of memory. No collective, no host sync.

Letters: T tokens, S streams, W width of each, X = (S-1) * W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gated_sum(
    stream_TSW: Tensor, there_TS: Tensor | None, gate_AX: Tensor, bias_X: Tensor
) -> Tensor:
    """[T, W], in the streams' dtype. `gate_AX` is G, [S*W, (S-1)*W]; `bias_X` is c.

    `there_TS`: bool, False for a stream that is missing, whose numbers must be zero; None where all are there. Without any, y is zero.
    """
    logit_TX = stream_TSW.flatten(1) @ gate_AX.to(stream_TSW.dtype) + bias_X.to(stream_TSW.dtype)
    logit_TSW = torch.cat([logit_TX, torch.zeros_like(stream_TSW[:, 0])], 1).view(stream_TSW.shape)
    if there_TS is not None:
        missing_TS1 = ~there_TS.unsqueeze(-1)
        nothing_T11 = missing_TS1.all(
            1, keepdim=True
        )  # padding: no stream at all, and a softmax over nothing is not a number
        logit_TSW = logit_TSW.masked_fill(missing_TS1 & ~nothing_T11, -math.inf)
    return (logit_TSW.softmax(1) * stream_TSW).sum(1)


def gated_sum_reference(
    streams: Sequence[Tensor | None], gate_AX: Tensor, bias_X: Tensor
) -> Tensor:
    """One token's y [W], from the formula; None is a stream that is missing. For tests."""
    width = bias_X.shape[0] // (len(streams) - 1)
    seen_A = torch.cat([bias_X.new_zeros(width) if one is None else one for one in streams])
    logits = [*(seen_A @ gate_AX + bias_X).view(-1, width), bias_X.new_zeros(width)]
    total_W, mass_W = bias_X.new_zeros(width), bias_X.new_zeros(width)
    for one, logit_W in zip(streams, logits, strict=True):
        if one is not None:
            total_W, mass_W = total_W + logit_W.exp() * one, mass_W + logit_W.exp()
    return total_W / mass_W if any(one is not None for one in streams) else total_W
