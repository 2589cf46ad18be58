"""The reference language model: a decoder-only transformer whose feed-forwards may be mixtures of experts.

    x = embedding(token);  x = block(x) for each block;  logits = output(norm(x))

Letters: B sequences, S tokens a sequence, D model width, V vocabulary, T = B*S tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.utils.checkpoint import checkpoint

from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.models import size
from dmoe.models.attention import Attention, heads_of
from dmoe.models.block import Block, BlockOutput, active_hidden_dim, is_sparse
from dmoe.models.norm import RMSNorm
from dmoe.models.rotary import Rotary, rotary_table
from dmoe.moe.experts import FeedForward
from dmoe.moe.keyed import normal_
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.moe.stats import LayerStats

__all__ = ["IGNORE", "LMOutput", "Transformer"]

IGNORE = -100
"""A target that is not predicted and counts nowhere in the loss."""

NOTHING_KNOWN = TokenContext()


@dataclass
class LMOutput:
    logits_BSV: Tensor | None
    """In the dtype of the output projection; None where there are targets, unless asked for."""
    loss_sum: Tensor | None
    """Scalar float32 (float64 for a float64 model): the sum of the cross-entropy in nats over the targets that are not ignored."""
    aux: list[dict[str, Tensor]] = field(default_factory=list)
    """For each MoE layer its auxiliary losses, raw (no coefficient), by name; see `dmoe.moe.balance`."""
    stats: list[LayerStats] = field(default_factory=list)
    """For each MoE layer what it counted."""


register_dataclass(LMOutput)  # FSDP2 before torch 2.13 looks for tensors in pytrees only, and misses a backward without a word


class Transformer(nn.Module):
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
        self, config: ModelConfig, moe: MoEConfig, vocab_size: int, *, virtual_ranks: int = 1, recompute: bool = False
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList()
        sparse = 0  # index among the MoE layers: the key of an expert's weights
        for index in range(config.layers):
            feed_forward: FeedForward | MoE
            if is_sparse(config, index):
                feed_forward = MoE.from_config(moe, config.dim, virtual_ranks=virtual_ranks, layer=sparse)
                sparse += 1
            else:
                hidden = active_hidden_dim(moe) if config.dense_dim is None else config.dense_dim
                feed_forward = FeedForward(moe.experts.kind, config.dim, hidden, config.dim)
            self.blocks.append(Block(config, Attention(config), feed_forward))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, vocab_size, bias=False)
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
        token_BS: Tensor,
        target_BS: Tensor | None = None,
        context: TokenContext | None = None,
        *,
        return_logits: bool = False,
    ) -> LMOutput:
        """token_BS and target_BS: int64 [B, S]; a target of -100 is ignored.

        A position without a target is still an ordinary token, routed and counted; only `context.valid_T` makes it padding.
        Padding is attended to by later positions, so it belongs at the end of a sequence.
        """
        context = replace(context or NOTHING_KNOWN, token_id_T=token_BS.flatten())
        x_BSD = self.embedding(token_BS)
        rotary = rotary_table(token_BS.shape[1], heads_of(self.config)[2], self.config.rope_base, x_BSD.dtype, x_BSD.device)
        out = LMOutput(None, None)
        for block in self.blocks:
            x_BSD, aux, stats = self._run(block, x_BSD, rotary, context)
            if aux is not None and stats is not None:
                out.aux.append(aux)
                out.stats.append(stats)
        logits_BSV = F.linear(self.norm(x_BSD), self.embedding.weight if self.output is None else self.output.weight)
        if target_BS is not None:
            out.loss_sum = cross_entropy_sum(logits_BSV, target_BS)
        if target_BS is None or return_logits:
            out.logits_BSV = logits_BSV
        return out

    def _run(self, block: nn.Module, x_BSD: Tensor, rotary: Rotary, context: TokenContext) -> BlockOutput:
        if not (self.recompute and torch.is_grad_enabled()):
            result: BlockOutput = block(x_BSD, rotary, context)
        else:  # nothing in a block draws random numbers, so there is no state to keep
            result = checkpoint(block, x_BSD, rotary, context, use_reentrant=False, preserve_rng_state=False)
        return result

    def moe_layers(self) -> list[MoE]:
        """The sparse layers, first to last; element l has `layer == l`."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def num_parameters(self) -> size.Parameters:
        """Counted from shapes, over all experts even where this rank holds a part of them; works on the meta device."""
        return size.parameters(self)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of this length; training takes three times as many. See `dmoe.models.size`."""
        return size.flops_per_token(self, seq_len)


def cross_entropy_sum(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """Scalar, at least float32: the sum of `-log softmax(logits)[target]` over the targets that are not ignored."""
    wide = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return F.cross_entropy(wide, target_BS.flatten(), ignore_index=IGNORE, reduction="sum")
