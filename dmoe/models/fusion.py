"""Fusion of the streams of a sample: concatenation, or separate encoders joined by a gate.

A stream of a sample is missing, as a whole, if any of its values is NaN: in the data because a
sensor failed, in training because `drop_streams` removes it. The values in its place are never
used: they are zeros when concatenated, and have no part in the gated sum.

Letters: B samples, S streams, W width of all streams concatenated, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.config.schema import MoEConfig
from dmoe.models.layers import BlockOutput
from dmoe.moe.experts.gated_fusion import gated_sum
from dmoe.moe.layer import MoE
from dmoe.moe.rng import keyed_noise, normal_
from dmoe.moe.routing import BatchShape, TokenContext


class Concatenation(nn.Module):
    """`x W + b` of the concatenated streams: [B, W] -> [B, 1, D]."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(sum(widths), dim)

    def initialize(self, seed: int, name: str, std: float) -> None:
        _initialize_linear(self.projection, std, seed, f"{name}.projection")

    def forward(self, x_BW: Tensor, present_BS: Tensor, context: TokenContext) -> BlockOutput:
        return BlockOutput(self.projection(x_BW).unsqueeze(1), None, None)


class GatedFusion(nn.Module):
    """A linear map to D and an encoder per stream, then a gated sum: [B, W] -> [B, 1, D].

    The encoders are the experts of one MoE layer whose tokens are (sample, stream) pairs and whose
    router is fixed: label = stream, K = 1. They are therefore sharded over ranks, dispatched,
    dropped and counted like other experts. A missing stream is padding to this layer and is not
    dispatched. A stream that is dropped by its expert (`moe.capacity`) counts as missing too.
    See `gated_sum` for the gate.
    """

    def __init__(self, widths: Sequence[int], dim: int, moe: MoEConfig, virtual_ranks: int) -> None:
        super().__init__()
        self.widths = list(widths)
        self.projections = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.encoders = MoE.from_config(moe, dim, virtual_ranks=virtual_ranks)
        width = (len(self.widths) - 1) * dim
        self.gate = nn.Parameter(torch.empty(len(self.widths) * dim, width))
        self.bias = nn.Parameter(torch.empty(width))

    def initialize(self, seed: int, name: str, std: float) -> None:
        """Draw the weights; the gate starts as the mean of the streams."""
        for s, projection in enumerate(self.projections):
            assert isinstance(projection, nn.Linear)
            _initialize_linear(projection, std, seed, f"{name}.projections.{s}")
        self.encoders.initialize(seed, std)
        nn.init.zeros_(self.gate)
        nn.init.zeros_(self.bias)

    def forward(self, x_BW: Tensor, present_BS: Tensor, context: TokenContext) -> BlockOutput:
        """Fuse the streams; `present_BS` is False where one is missing, whose values must be 0."""
        streams = zip(self.projections, torch.split(x_BW, self.widths, dim=1), strict=True)
        x_BSD = torch.stack([projection(x) for projection, x in streams], 1)
        label_T = torch.arange(len(self.widths), device=x_BW.device).repeat(len(x_BW))
        out = self.encoders(x_BSD, replace(context, label_T=label_T, valid_T=present_BS.flatten()))
        kept_BS = out.plan.is_kept_TK.any(-1).view(present_BS.shape)
        return BlockOutput(
            gated_sum(out.y, kept_BS, self.gate, self.bias).unsqueeze(1), out.aux, out.stats
        )


def present_streams(x_BW: Tensor, widths: Sequence[int]) -> Tensor:
    """Return True for each stream that is not missing: bool [B, S]."""
    return torch.stack([~part.isnan().any(1) for part in torch.split(x_BW, list(widths), dim=1)], 1)


def drop_streams(present_BS: Tensor, rate: float, context: TokenContext) -> Tensor:
    """Remove one stream from a fraction of the samples; never the last one of a sample.

    The draw is keyed by (seed, step, index of the sample in the global batch), so it does not
    depend on the ranks. All present streams of a sample are equally likely. No host sync.

    Args:
        present_BS: bool, the streams that are not missing.
        rate: fraction of the samples that lose a stream.
        context: must hold a `noise_key`, else ConfigError.

    Returns:
        bool [B, S], the streams that remain.
    """
    if context.noise_key is None:
        allowed = "stream_dropout draws in training, and needs a key for it"
        fix = "pass TokenContext(noise_key=(seed, step)), or call .eval()"
        raise ConfigError("noise_key", None, allowed, fix)
    count_B1 = present_BS.sum(1, keepdim=True)
    like = torch.empty(present_BS.shape, dtype=torch.float32, device=present_BS.device)
    draw_B2 = keyed_noise(
        torch.rand, "stream_dropout", like, 2, 0, context, BatchShape(len(present_BS))
    )
    drops_B1 = (draw_B2[:, :1] < rate) & (count_B1 > 1)
    # Index among the present streams of the sample.
    position_BS = present_BS.cumsum(1) - 1
    selected_BS = present_BS & (position_BS == (draw_B2[:, 1:] * count_B1).floor())
    kept_BS: Tensor = present_BS & ~(selected_BS & drops_B1)
    return kept_BS


def zero_missing(x_BW: Tensor, present_BS: Tensor, widths: Sequence[int]) -> Tensor:
    """Return `x_BW` with zeros in the columns of missing streams."""
    width_S = torch.tensor(list(widths), device=x_BW.device)
    present_BW = present_BS.repeat_interleave(width_S, dim=1, output_size=x_BW.shape[1])
    return x_BW.masked_fill(~present_BW, 0.0)


def _initialize_linear(linear: nn.Linear, std: float, seed: int, name: str) -> None:
    normal_(linear.weight, std, seed, f"{name}.weight")
    nn.init.zeros_(linear.bias)
