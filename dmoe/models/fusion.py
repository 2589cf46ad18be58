"""Several streams of a sample become one vector: side by side, or each encoded by itself and joined by a gate.

A stream of a sample is missing, as a whole, where any of its numbers is NaN: so the data says that a sensor failed, and in training
`drop_streams` takes more. What stands in its place is never read: side by side it is zeros, behind a gate it has no part in the sum.

Letters: B samples, S streams, W width of all streams side by side, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dmoe.config.schema import MoEConfig
from dmoe.models.layers import BlockOutput
from dmoe.moe.gated_fusion import gated_sum
from dmoe.moe.layer import MoE
from dmoe.moe.rng import keyed_noise, normal_
from dmoe.moe.routing import TokenContext


class Concatenation(nn.Module):
    """`x W + b` of the streams side by side. [B, W] -> [B, 1, D]."""

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(sum(widths), dim)

    def initialize(self, seed: int, name: str, std: float) -> None:
        _draw(self.projection, std, seed, f"{name}.projection")

    def forward(self, x_BW: Tensor, there_BS: Tensor, context: TokenContext) -> BlockOutput:
        return BlockOutput(self.projection(x_BW).unsqueeze(1), None, None)


class GatedFusion(nn.Module):
    """Each stream s: a linear map to D, then encoder s; then the gate of `dmoe.moe.gate`. [B, W] -> [B, 1, D].

    The encoders are the experts of one mixture layer, whose tokens are (sample, stream) pairs and whose router is fixed: label =
    stream, K = 1. So they shard over ranks, and their rows travel, drop and count like any. A missing stream is padding to this
    layer: it sends nothing. One whose expert had no slot left (`moe.capacity`) counts as missing too.
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
        """The gate starts as the mean."""
        for s, projection in enumerate(self.projections):
            assert isinstance(projection, nn.Linear)
            _draw(projection, std, seed, f"{name}.projections.{s}")
        self.encoders.initialize(seed, std)
        nn.init.zeros_(self.gate)
        nn.init.zeros_(self.bias)

    def forward(self, x_BW: Tensor, there_BS: Tensor, context: TokenContext) -> BlockOutput:
        """there_BS: bool, False where a stream is missing; its numbers in `x_BW` must be zero."""
        streams = zip(self.projections, torch.split(x_BW, self.widths, dim=1), strict=True)
        x_BSD = torch.stack([projection(x) for projection, x in streams], 1)
        label_T = torch.arange(len(self.widths), device=x_BW.device).repeat(len(x_BW))
        out = self.encoders(x_BSD, replace(context, label_T=label_T, valid_T=there_BS.flatten()))
        assert out.routing.keep_TK is not None
        kept_BS = out.routing.keep_TK.any(-1).view(there_BS.shape)
        return BlockOutput(
            gated_sum(out.y, kept_BS, self.gate, self.bias).unsqueeze(1), out.aux, out.stats
        )


def present(x_BW: Tensor, widths: Sequence[int]) -> Tensor:
    """bool [B, S]: which streams are there."""
    return torch.stack([~part.isnan().any(1) for part in torch.split(x_BW, list(widths), dim=1)], 1)


def drop_streams(there_BS: Tensor, share: float, context: TokenContext) -> Tensor:
    """`there_BS` without one stream of about that share of the samples, each of those there alike; a last one stays.

    Drawn by (seed, step, index of the sample in the global batch), so not by rank. Raises ValueError where the context has no
    `noise_key`. No host sync.
    """
    if context.noise_key is None:
        raise ValueError(
            "stream_dropout draws in training: pass TokenContext(noise_key=(seed, step)), or call .eval()"
        )
    count_B1 = there_BS.sum(1, keepdim=True)
    context = replace(context, sequences=len(there_BS))
    like = torch.empty(there_BS.shape, dtype=torch.float32, device=there_BS.device)
    draw_B2 = keyed_noise(torch.rand, "stream_dropout", like, 2, 0, context)
    hit_B1 = (draw_B2[:, :1] < share) & (count_B1 > 1)
    place_BS = there_BS.cumsum(1) - 1  # its place among those that are there
    unlucky_BS = there_BS & (place_BS == (draw_B2[:, 1:] * count_B1).floor())
    kept_BS: Tensor = there_BS & ~(unlucky_BS & hit_B1)
    return kept_BS


def blank(x_BW: Tensor, there_BS: Tensor, widths: Sequence[int]) -> Tensor:
    """`x_BW` with zeros for what is missing."""
    wide = torch.tensor(list(widths), device=x_BW.device)
    return x_BW.masked_fill(
        ~there_BS.repeat_interleave(wide, dim=1, output_size=x_BW.shape[1]), 0.0
    )


def _draw(linear: nn.Linear, std: float, seed: int, name: str) -> None:
    normal_(linear.weight, std, seed, f"{name}.weight")
    nn.init.zeros_(linear.bias)
