"""What a trainer, `verify` and `explain` ask of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.models import size
from dmoe.models.block import BlockOutput
from dmoe.models.output import ModelOutput
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext

__all__ = ["Model"]


class Model(nn.Module, ABC):
    """A network with mixture-of-experts layers. Its constructor works on the meta device and leaves the weights of seed 0."""

    recompute: bool
    """Keep only each block's input, and compute the block again in backward."""

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Draw every weight anew, as a function of (seed, name): after `to_empty`, the weights of a direct construction."""

    @abstractmethod
    def forward(
        self, input: Tensor, target: Tensor | None = None, context: TokenContext | None = None, *, return_logits: bool = False
    ) -> ModelOutput:
        """input [B, ...], target int64 [B, S] with one for each position the context has a label for."""

    def run_block(self, block: nn.Module, *given: object) -> BlockOutput:
        if not (self.recompute and torch.is_grad_enabled()):
            result: BlockOutput = block(*given)
        else:  # nothing in a block draws random numbers without a key, so there is no state to keep
            result = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
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
