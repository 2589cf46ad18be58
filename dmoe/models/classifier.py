"""The reference classifier: streams of a sample, joined, through residual feed-forwards that may be mixtures of experts, to logits.

    x = concatenation or gated fusion of the streams;  x = x + feed_forward(norm(x)) for each block;  logits = head(norm(x))

With `layers: 0` there are no blocks and no norm, and with `fusion: concat` no first projection either: the head reads the streams as
they are. So `head: experts` alone is one mixture layer from W numbers to C logits: the dense soft mixture (router soft), or experts of
different cost within a budget (router budget).

Letters: B samples, S streams, W width of all streams side by side, D model width, C classes. A sample is a sequence of one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.models.base import Model, ModelOutput, token_losses
from dmoe.models.fusion import Concatenation, GatedFusion, blank, drop_streams, present
from dmoe.models.layers import BlockOutput, RMSNorm, active_hidden_dim, is_sparse
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.rng import normal_
from dmoe.moe.routing import TokenContext

EMPTY_CONTEXT = TokenContext()


class Classifier(Model):
    """A feed-forward network over samples of several streams; `dmoe.models.fusion` says how they are joined.

    Args:
        config: the shape of the network; what concerns attention is not read.
        moe: the encoders of gated fusion, the sparse blocks and the head of experts; also the activation of the dense feed-forwards
            and, where `dense_dim` is not set, their width.
        widths: of the streams, which stand side by side in this order.
        classes: C.
        virtual_ranks: groups of samples the MoE layers treat as ranks of their own; B must divide by it.
        recompute: keep only each block's input and compute the block again in backward; see `Transformer`.

    Every weight is a function of (seed, name), so `initialize` after `to_empty` gives the weights of a direct construction.
    The constructor leaves the weights of seed 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        widths: Sequence[int],
        classes: int,
        *,
        virtual_ranks: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.widths, self.recompute = config, list(widths), recompute
        gated, layers = config.fusion == "gated", config.layers
        self.fusion: GatedFusion | Concatenation | None = None
        if gated:
            self.fusion = GatedFusion(widths, config.dim, moe, virtual_ranks)
        elif layers:
            self.fusion = Concatenation(widths, config.dim)
        sparse = int(gated)  # index among the MoE layers: the key of an expert's weights
        self.blocks = nn.ModuleList()
        for index in range(layers):
            feed_forward: FeedForward | MoE
            if is_sparse(config, index) and not gated:
                feed_forward = MoE.from_config(
                    moe, config.dim, virtual_ranks=virtual_ranks, layer=sparse
                )
                sparse += 1
            else:
                hidden = active_hidden_dim(moe) if config.dense_dim is None else config.dense_dim
                feed_forward = FeedForward(moe.experts.kind, config.dim, hidden, config.dim)
            self.blocks.append(ResidualFeedForward(config, feed_forward))
        self.norm = RMSNorm(config.dim, config.norm_eps) if layers else None
        width = sum(self.widths) if self.fusion is None else config.dim
        self.head: nn.Linear | MoE = (
            nn.Linear(width, classes)
            if config.head == "linear"
            else MoE.from_config(
                moe, width, out_dim=classes, virtual_ranks=virtual_ranks, layer=sparse
            )
        )
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        """Draw every weight anew from N(0, init_std^2); what writes to the residual stream is divided by sqrt(layers). Biases and the
        gate are zero."""
        std = self.config.init_std
        if self.fusion is not None:
            self.fusion.initialize(seed, "fusion", std)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, ResidualFeedForward)
            block.initialize(seed, f"blocks.{index}", std, std / math.sqrt(self.config.layers))
        if self.norm is not None:
            self.norm.initialize()
        if isinstance(self.head, MoE):
            self.head.initialize(seed, std)
        else:
            normal_(self.head.weight, std, seed, "head.weight")
            nn.init.zeros_(self.head.bias)

    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        context: TokenContext | None = None,
        *,
        return_logits: bool = False,
    ) -> ModelOutput:
        """input: float [B, W]; NaN marks a stream of a sample that is missing, as a whole. target: int64 [B, 1]; -100 is ignored.

        `context.valid_T` [B]: False for padding, which no MoE layer routes or counts. In training with `stream_dropout` it must hold a
        `noise_key`. Logits are [B, 1, C].
        """
        context, out = context or EMPTY_CONTEXT, ModelOutput(None, None)
        x_B1D = self._tell(self._join(input.to(next(self.parameters()).dtype), context), out)
        for block in self.blocks:
            x_B1D = self._tell(self.run_block(block, x_B1D, context), out)
        if self.norm is not None:
            x_B1D = self.norm(x_B1D)
        logits = self._tell(_through(self.head, x_B1D, context), out)
        if target is not None:
            out.loss_sum, out.loss_T, out.correct_T = token_losses(
                logits, target, one_by_one=not self.training
            )
        if target is None or return_logits:
            out.logits = logits
        return out

    def _join(self, x_BW: Tensor, context: TokenContext) -> BlockOutput:
        """The residual stream stays in the weights' dtype: under autocast, float32."""
        there_BS = present(x_BW, self.widths)
        if context.valid_T is not None:
            there_BS = there_BS & context.valid_T.unsqueeze(1)
        if self.training and self.config.stream_dropout:
            there_BS = drop_streams(there_BS, self.config.stream_dropout, context)
        x_BW = blank(x_BW, there_BS, self.widths)
        if self.fusion is None:
            return BlockOutput(x_BW.unsqueeze(1), None, None)
        joined: BlockOutput = self.fusion(x_BW, there_BS, context)
        return joined._replace(x_BSD=joined.x_BSD.to(x_BW.dtype))

    def _tell(self, part: BlockOutput, out: ModelOutput) -> Tensor:
        """The part's vectors; what its MoE layer tells goes to `out`."""
        if part.aux is not None and part.stats is not None:
            out.aux.append(part.aux)
            out.stats.append(part.stats)
        return part.x_BSD


class ResidualFeedForward(nn.Module):
    """`x + feed_forward(norm(x))`: a transformer's block without its attention."""

    def __init__(self, config: ModelConfig, feed_forward: FeedForward | MoE) -> None:
        super().__init__()
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        self.feed_forward_norm.initialize()
        if isinstance(self.feed_forward, MoE):  # keyed by its index among the MoE layers
            self.feed_forward.initialize(seed, std, out_std)
        else:
            self.feed_forward.initialize(seed, f"{name}.feed_forward", std, out_std)

    def forward(self, x_B1D: Tensor, context: TokenContext) -> BlockOutput:
        out = _through(self.feed_forward, self.feed_forward_norm(x_B1D), context)
        return out._replace(x_BSD=x_B1D + out.x_BSD)


def _through(layer: nn.Module, x_B1D: Tensor, context: TokenContext) -> BlockOutput:
    if isinstance(layer, MoE):
        out = layer(x_B1D, context)
        return BlockOutput(out.y, out.aux, out.stats)
    return BlockOutput(layer(x_B1D), None, None)
