"""The reference language model: a decoder-only transformer whose feed-forwards may be mixtures of experts.

    x = embedding(token);  x = block(x) for each block;  logits = output(norm(x))

Letters: B sequences, S tokens a sequence, D model width, V vocabulary, T = B*S tokens.

One transformer block, and which of the blocks are sparse.

Letters: B sequences, S tokens a sequence, D model width.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.models.attention import Attention, Rotary, heads_of, rotary_table
from dmoe.models.base import Model, ModelOutput, token_losses
from dmoe.models.layers import BlockOutput, RMSNorm, active_hidden_dim, is_sparse
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.rng import normal_
from dmoe.moe.routing import TokenContext

EMPTY_CONTEXT = TokenContext()


class Transformer(Model):
    """Pre-norm decoder with rotary positions (Llama, Mixtral, Qwen3); blocks are sparse or dense as the config says.

    Args:
        config: the shape of the network.
        moe: the sparse layers; also the activation of the dense feed-forwards and, where `dense_dim` is not set, their width.
        vocab_size: V.
        virtual_ranks: groups of tokens the MoE layers treat as ranks of their own; B*S must divide by it.
        recompute: keep only each block's input and compute the block again in backward. Losses and counts are returned values
            of the first pass, so nothing counts twice; the MoE layers' collectives run twice, on every rank alike.

    Every weight is a function of (seed, name), so `initialize` after `to_empty` gives the weights of a direct construction.
    The constructor leaves the weights of seed 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        vocab_size: int,
        *,
        virtual_ranks: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        sparse = 0  # index among the MoE layers: the key of an expert's weights
        for index in range(config.layers):
            feed_forward: FeedForward | MoE
            if is_sparse(config, index):
                feed_forward = MoE.from_config(
                    moe, config.dim, virtual_ranks=virtual_ranks, layer=sparse
                )
                sparse += 1
            else:
                hidden = active_hidden_dim(moe) if config.dense_dim is None else config.dense_dim
                feed_forward = FeedForward(moe.experts.kind, config.dim, hidden, config.dim)
            self.blocks.append(Block(config, Attention(config), feed_forward))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = (
            None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)
        )
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        """Draw every weight anew from N(0, init_std^2); what writes to the residual stream is divided by sqrt(2 * layers)."""
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
    ) -> ModelOutput:
        """input and target: token ids, int64 [B, S]; a target of -100 is ignored.

        A position without a target is still an ordinary token, routed and counted; only `context.valid_T` makes it padding.
        Padding is attended to by later positions, so it belongs at the end of a sequence.
        """
        context = replace(context or EMPTY_CONTEXT, token_id_T=input.flatten())
        x_BSD = self.embedding(input)
        rotary = rotary_table(
            input.shape[1],
            heads_of(self.config)[2],
            self.config.rope_base,
            x_BSD.dtype,
            x_BSD.device,
        )
        out = ModelOutput(None, None)
        for block in self.blocks:
            x_BSD, aux, stats = self.run_block(block, x_BSD, rotary, context)
            if aux is not None and stats is not None:
                out.aux.append(aux)
                out.stats.append(stats)
        logits_BSV = F.linear(
            self.norm(x_BSD), self.embedding.weight if self.output is None else self.output.weight
        )
        if target is not None:
            out.loss_sum, out.loss_T, out.correct_T = token_losses(
                logits_BSV, target, one_by_one=not self.training
            )
        if target is None or return_logits:
            out.logits = logits_BSV
        return out


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`: pre-norm, so the residual stream is never rescaled."""

    def __init__(
        self, config: ModelConfig, attention: Attention, feed_forward: FeedForward | MoE
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x_BSD: Tensor, rotary: Rotary, context: TokenContext) -> BlockOutput:
        """The residual stream stays in the embedding's dtype: under autocast, float32."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary)
        inner_BSD = self.feed_forward_norm(x_BSD)
        if isinstance(self.feed_forward, MoE):
            out = self.feed_forward(inner_BSD, context)
            return BlockOutput(x_BSD + out.y, out.aux, out.stats)
        return BlockOutput(x_BSD + self.feed_forward(inner_BSD), None, None)

    def initialize(self, seed: int, name: str, std: float, out_std: float) -> None:
        """Everything in this block; `name` is its path in the model."""
        self.attention_norm.initialize()
        self.feed_forward_norm.initialize()
        self.attention.initialize(seed, f"{name}.attention", std, out_std)
        if isinstance(self.feed_forward, MoE):  # keyed by its index among the MoE layers
            self.feed_forward.initialize(seed, std, out_std)
        else:
            self.feed_forward.initialize(seed, f"{name}.feed_forward", std, out_std)
