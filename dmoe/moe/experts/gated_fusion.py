"""Gated fusion of streams: a gate for each element, computed from all streams together.

Arevalo et al. 2017, "Gated Multimodal Units".

    two streams:   g = sigmoid([f_1 | f_2] G + c),                     y = g * f_1 + (1 - g) * f_2
    S streams:     g = softmax over s of ([f_1 | ... | f_S] G_s + c_s),   y = sum_s g_s * f_s

The last stream's logit is 0, which makes the softmax of two exactly the sigmoid. A missing stream
is left out of the softmax. G = 0 and c = 0 give the mean. Cost: 2 S (S-1) W^2 FLOPs per token and T
* S * W values of memory. No collective, no host sync.

Letters: T tokens, S streams, W width of each stream, X = (S-1) * W, A = S * W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gated_sum(
    stream_TSW: Tensor, present_TS: Tensor | None, gate_AX: Tensor, bias_X: Tensor
) -> Tensor:
    """Sum the streams, weighted elementwise by the gate; 0 for tokens without any stream.

    Args:
        stream_TSW: the streams; any values where missing.
        present_TS: bool, False where a stream is missing. None: all present.
        gate_AX: G.
        bias_X: c.

    Returns:
        [T, W], in the dtype of the streams.
    """
    if present_TS is not None:
        stream_TSW = stream_TSW.masked_fill(~present_TS.unsqueeze(-1), 0.0)
    logit_TX = stream_TSW.flatten(1) @ gate_AX.to(stream_TSW.dtype) + bias_X.to(stream_TSW.dtype)
    logit_TSW = torch.cat([logit_TX, torch.zeros_like(stream_TSW[:, 0])], 1).view(stream_TSW.shape)
    if present_TS is not None:
        missing_TS1 = ~present_TS.unsqueeze(-1)
        # padding has no stream at all, and a softmax over nothing is NaN
        none_T11 = missing_TS1.all(1, keepdim=True)
        logit_TSW = logit_TSW.masked_fill(missing_TS1 & ~none_T11, -math.inf)
    return (logit_TSW.softmax(1) * stream_TSW).sum(1)


def gated_sum_reference(
    streams: Sequence[Tensor | None], gate_AX: Tensor, bias_X: Tensor
) -> Tensor:
    """Compute `gated_sum` of one token from the formula, [W]; None marks a missing stream.

    The naive twin of adapters' gated fusion (`dmoe verify`) uses it.
    """
    width = bias_X.shape[0] // (len(streams) - 1)
    input_A = torch.cat([bias_X.new_zeros(width) if f is None else f for f in streams])
    logits = [*(input_A @ gate_AX + bias_X).view(-1, width), bias_X.new_zeros(width)]
    total_W, mass_W = bias_X.new_zeros(width), bias_X.new_zeros(width)
    for f, logit_W in zip(streams, logits, strict=True):
        if f is not None:
            total_W, mass_W = total_W + logit_W.exp() * f, mass_W + logit_W.exp()
    return total_W / mass_W if any(f is not None for f in streams) else total_W
