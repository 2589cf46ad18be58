"""TODO docstring."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.models.attention import Attention, Rotary
from dmoe.models.norm import RMSNorm
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext


class BlockOutput(NamedTuple):
    """A tuple and not a dataclass: DDP and checkpointing look for tensors inside tuples."""

    x_BSD: Tensor
    aux: dict[str, Tensor] | None
    """The auxiliary losses of a sparse block, raw, by name; None for a dense one."""
    stats: LayerStats | None


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


def is_sparse(config: ModelConfig, index: int) -> bool:
    """Block `index` is a mixture of experts: every `moe_every`-th one after the first `dense_first`."""
    if config.moe_every <= 0 or index < config.dense_first:
        return False
    return (index - config.dense_first + 1) % config.moe_every == 0


def active_hidden_dim(moe: MoEConfig) -> int:
    """Hidden units a token passes in a MoE layer: of its K experts and of the shared ones."""
    shared_dim = moe.expert_dim if moe.experts.shared_dim is None else moe.experts.shared_dim
    return moe.top_k * moe.expert_dim + moe.experts.shared * shared_dim
