"""The reference language model: a decoder-only transformer whose feed-forwards may be MoE layers.

    x = embedding(token);  x = block(x) for each block;  logits = output(norm(x))

Letters: B sequences, S tokens per sequence, D model width, V vocabulary size, T = B*S tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.rules.model import check_attention, head_dim, is_moe_block
from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.config.schema.constraints import check_bounds, check_types
from dmoe.models.attention import (
    Attention,
    Rotary,
    positions_of,
    rotary_table,
    visible_in_document,
)
from dmoe.models.base import Model, ModelOutput, token_losses
from dmoe.models.cross_entropy import linear_token_losses
from dmoe.models.key_value_cache import KeyValueCache, LayerCache
from dmoe.models.layers import (
    BlockOutput,
    RMSNorm,
    dense_feed_forward,
    initialize_feed_forward,
    run_feed_forward,
)
from dmoe.moe.experts import FeedForward
from dmoe.moe.inputs import as_int64, context_of_rows
from dmoe.moe.layer import MoE
from dmoe.moe.rng import normal_
from dmoe.moe.routing import EMPTY_CONTEXT, TokenContext, masked


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`: pre-norm.

    The residual stream itself is never rescaled.
    """

    def __init__(
        self, config: ModelConfig, attention: Attention, feed_forward: FeedForward | MoE
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self,
        x_BSD: Tensor,
        rotary: Rotary,
        context: TokenContext,
        visible_BSS: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> BlockOutput:
        """Apply the block; the residual stream keeps its dtype: under autocast, float32."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, visible_BSS, cache)
        out = run_feed_forward(self.feed_forward, self.feed_forward_norm(x_BSD), context)
        return out._replace(x_BSD=x_BSD + out.x_BSD)

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        """Draw the weights of this block.

        Args:
            seed: key of the draw.
            name: path of the block in the model.
            std: of weights that read the residual stream.
            out_std: of weights that write to it.
        """
        self.attention_norm.initialize()
        self.feed_forward_norm.initialize()
        self.attention.initialize(seed, f"{name}.attention", std, out_std)
        initialize_feed_forward(self.feed_forward, seed, f"{name}.feed_forward", std, out_std)


class Transformer(Model):
    """Pre-norm decoder with rotary positions (Llama, Mixtral, Qwen3), with sparse or dense blocks.

    Every weight is a function of (seed, name), so `initialize` after `to_empty` gives the weights
    of a direct construction. The constructor leaves the weights of seed 0.

    Args:
        config: shape of the network.
        moe: the MoE layers; also the activation of the dense feed-forwards and, without
            `dense_dim`, their width.
        vocab_size: V.
        virtual_ranks: groups of tokens that the MoE layers treat as separate ranks; B*S must be
            divisible by it.
        recompute: what the backward computes again, `train.recompute`; True is `block`. Losses
            and counts are returned by the first pass, so nothing is counted twice; with `block` the
            MoE layers' collectives run twice, on every rank alike.
    """

    reads_positions = True

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        vocab_size: int,
        *,
        virtual_ranks: int = 1,
        recompute: str | bool = "none",
    ) -> None:
        super().__init__()
        check_types(config, "model.")
        check_bounds(config, "model.")
        check_attention(config)
        self.config = config
        self.head_dim = head_dim(config)
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        # Index among the MoE layers: part of the key of an expert's weights.
        moe_index = 0
        for index in range(config.layers):
            feed_forward: FeedForward | MoE
            if is_moe_block(config, index):
                feed_forward = MoE.from_config(
                    moe, config.dim, virtual_ranks=virtual_ranks, layer=moe_index
                )
                moe_index += 1
            else:
                feed_forward = dense_feed_forward(config, moe)
            self.blocks.append(Block(config, Attention(config), feed_forward))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = (
            None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)
        )
        self.set_recompute(recompute)
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        """Draw all weights from N(0, init_std^2).

        Weights that write to the residual stream are divided by sqrt(2 * layers).
        """
        std = self.config.init_std
        out_std = std / math.sqrt(2 * self.config.layers)
        normal_(self.embedding.weight, std, seed, "embedding.weight")
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.initialize(seed, f"blocks.{index}", std, out_std)
        self.norm.initialize()
        if self.output is not None:
            normal_(self.output.weight, std, seed, "output.weight")

    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        context: TokenContext | None = None,
        *,
        return_logits: bool = False,
        cache: KeyValueCache | None = None,
    ) -> ModelOutput:
        """Predict each next token.

        A position without a target is still an ordinary token that is routed and counted; only
        `context.valid_T` makes it padding. Later positions attend to padding, so it belongs at the
        end of a sequence.

        Args:
            input: token ids, int64 [B, S].
            target: token ids, int64 [B, S]; IGNORE_INDEX (-100) is not predicted.
            context: labels, padding and positions in documents of the tokens.
            return_logits: return logits although there are targets.
            cache: holds the tokens before these, and then these too.
        """
        input = as_int64("input", input)
        context = context_of_rows(context or EMPTY_CONTEXT, input.shape)
        context = replace(context, token_id_T=input.flatten())
        x_BSD = self.embedding(input)
        if context.valid_T is not None:  # attention multiplies values by weights of 0
            x_BSD = masked(x_BSD.flatten(0, 1), context.valid_T.flatten()).view_as(x_BSD)
        position_BS = positions_of(context, input)
        visible_BSS = None if position_BS is None else visible_in_document(position_BS)
        base, dtype, device = self.config.rope_base, x_BSD.dtype, x_BSD.device
        rotary = (
            rotary_table(input.shape[1], self.head_dim, base, dtype, device, position_BS)
            if cache is None
            else cache.rotary(input.shape[1])
        )
        out = ModelOutput(None, None)
        for index, block in enumerate(self.blocks):
            more = (visible_BSS, None if cache is None else cache.layers[index])
            x_BSD, aux, stats = self.run_block(block, x_BSD, rotary, context, *more)
            if aux is not None and stats is not None:
                out.aux.append(aux)
                out.stats.append(stats)
        if cache is not None:
            cache.advance(input.shape[1])
        output_VD = self.embedding.weight if self.output is None else self.output.weight
        x_BSD, per_token = self.norm(x_BSD), not self.training
        if target is not None and not return_logits and not (per_token and x_BSD.requires_grad):
            losses = linear_token_losses(x_BSD, output_VD, target, per_token)
        else:
            logits_BSV = F.linear(x_BSD, output_VD)
            if target is None or return_logits:
                out.logits = logits_BSV
            if target is None:
                return out
            losses = token_losses(logits_BSV, target, per_token)
        out.loss_sum, out.loss_T, out.correct_T = losses
        return out
