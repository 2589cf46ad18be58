"""The reference classifier: fused streams, residual feed-forwards that may be MoE layers, logits.

    x = concatenation or gated fusion of the streams
    x = x + feed_forward(norm(x)) for each block;  logits = head(norm(x))

With `layers: 0` there are no blocks and no norm, and with `fusion: concat` no input projection
either: the head reads the concatenated streams. `head: experts` alone is then one MoE layer from W
features to C logits: the dense soft mixture (router soft), or experts of different cost within a
budget (router budget).

Letters: B samples, S streams, W width of all streams concatenated, D model width, C classes. A
sample is a sequence of one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from dmoe.config.rules.model import is_moe_block
from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.config.schema.constraints import check_bounds, check_types
from dmoe.models.base import Model, ModelOutput, token_losses
from dmoe.models.fusion import (
    Concatenation,
    GatedFusion,
    drop_streams,
    present_streams,
    zero_missing,
)
from dmoe.models.layers import (
    BlockOutput,
    RMSNorm,
    dense_feed_forward,
    initialize_feed_forward,
    run_feed_forward,
)
from dmoe.moe.experts import FeedForward
from dmoe.moe.inputs import context_of_rows
from dmoe.moe.layer import MoE
from dmoe.moe.rng import normal_
from dmoe.moe.routing import EMPTY_CONTEXT, TokenContext


class Classifier(Model):
    """Feed-forward network over samples of several streams, which `dmoe.models.fusion` joins.

    Every weight is a function of (seed, name), so `initialize` after `to_empty` gives the weights
    of a direct construction. The constructor leaves the weights of seed 0.

    Args:
        config: shape of the network; its attention fields are not read.
        moe: the encoders of gated fusion, the sparse blocks and the head of experts; also the
            activation of the dense feed-forwards and, without `dense_dim`, their width.
        widths: width of each stream, in the order of the input columns.
        classes: C.
        virtual_ranks: groups of samples that the MoE layers treat as separate ranks; B must be
            divisible by it.
        recompute: see `Transformer`.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        widths: Sequence[int],
        classes: int,
        *,
        virtual_ranks: int = 1,
        recompute: str | bool = "none",
    ) -> None:
        super().__init__()
        check_types(config, "model.")
        check_bounds(config, "model.")
        self.config, self.widths = config, list(widths)
        gated, layers = config.fusion == "gated", config.layers
        self.fusion: GatedFusion | Concatenation | None = None
        if gated:
            self.fusion = GatedFusion(widths, config.dim, moe, virtual_ranks)
        elif layers:
            self.fusion = Concatenation(widths, config.dim)
        # Index among the MoE layers: part of the key of an expert's weights. The encoders are 0.
        moe_index = int(gated)
        self.blocks = nn.ModuleList()
        for index in range(layers):
            feed_forward: FeedForward | MoE
            if is_moe_block(config, index) and not gated:
                feed_forward = MoE.from_config(
                    moe, config.dim, virtual_ranks=virtual_ranks, layer=moe_index
                )
                moe_index += 1
            else:
                feed_forward = dense_feed_forward(config, moe)
            self.blocks.append(ResidualBlock(config, feed_forward))
        self.norm = RMSNorm(config.dim, config.norm_eps) if layers else None
        width = sum(self.widths) if self.fusion is None else config.dim
        self.head: nn.Linear | MoE = (
            nn.Linear(width, classes)
            if config.head == "linear"
            else MoE.from_config(
                moe, width, out_dim=classes, virtual_ranks=virtual_ranks, layer=moe_index
            )
        )
        self.set_recompute(recompute)
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        """Draw all weights from N(0, init_std^2).

        Weights that write to the residual stream are divided by sqrt(layers). Biases and the gate
        are zero.
        """
        std = self.config.init_std
        if self.fusion is not None:
            self.fusion.initialize(seed, "fusion", std)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, ResidualBlock)
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
        """Predict the class of each sample.

        Args:
            input: float [B, W]; NaN marks a stream of a sample that is missing as a whole.
            target: int64 [B, 1]; IGNORE_INDEX (-100) is not predicted.
            context: `valid_T` [B] is False for padding, which no MoE layer routes or counts. In
                training with `stream_dropout` it must hold a `noise_key`.
            return_logits: return logits, [B, 1, C], although there are targets.
        """
        context, out = context or EMPTY_CONTEXT, ModelOutput(None, None)
        context = context_of_rows(context, input.shape[:1])
        x_B1D = self._collect(self._fuse(input.to(next(self.parameters()).dtype), context), out)
        for block in self.blocks:
            x_B1D = self._collect(self.run_block(block, x_B1D, context), out)
        if self.norm is not None:
            x_B1D = self.norm(x_B1D)
        logits = self._collect(run_feed_forward(self.head, x_B1D, context), out)
        if target is not None:
            out.loss_sum, out.loss_T, out.correct_T = token_losses(
                logits, target, per_token=not self.training
            )
        if target is None or return_logits:
            out.logits = logits
        return out

    def _fuse(self, x_BW: Tensor, context: TokenContext) -> BlockOutput:
        """Fuse the streams, in the weights' dtype: under autocast, float32."""
        present_BS = present_streams(x_BW, self.widths)
        if context.valid_T is not None:
            present_BS = present_BS & context.valid_T.unsqueeze(1)
        if self.training and self.config.stream_dropout:
            present_BS = drop_streams(present_BS, self.config.stream_dropout, context)
        x_BW = zero_missing(x_BW, present_BS, self.widths)
        if self.fusion is None:
            return BlockOutput(x_BW.unsqueeze(1), None, None)
        fused: BlockOutput = self.fusion(x_BW, present_BS, context)
        return fused._replace(x_BSD=fused.x_BSD.to(x_BW.dtype))

    def _collect(self, part: BlockOutput, out: ModelOutput) -> Tensor:
        """Append the losses and counts of a part's MoE layer to `out`; return its vectors."""
        if part.aux is not None and part.stats is not None:
            out.aux.append(part.aux)
            out.stats.append(part.stats)
        return part.x_BSD


class ResidualBlock(nn.Module):
    """`x + feed_forward(norm(x))`: a transformer block without attention."""

    def __init__(self, config: ModelConfig, feed_forward: FeedForward | MoE) -> None:
        super().__init__()
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        """Draw the weights; arguments as in `transformer.Block.initialize`."""
        self.feed_forward_norm.initialize()
        initialize_feed_forward(self.feed_forward, seed, f"{name}.feed_forward", std, out_std)

    def forward(self, x_B1D: Tensor, context: TokenContext) -> BlockOutput:
        out = run_feed_forward(self.feed_forward, self.feed_forward_norm(x_B1D), context)
        return out._replace(x_BSD=x_B1D + out.x_BSD)
