"""What a trainer, `verify` and `explain` ask of a model.

What a model returns, whatever it models.

Letters: B samples of a batch, S positions of each, V outputs (a vocabulary, or classes), T = B*S.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass
from torch.utils.checkpoint import checkpoint

from dmoe.models import flops
from dmoe.models.block import BlockOutput
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext


class Model(nn.Module, ABC):
    """A network with mixture-of-experts layers. Its constructor works on the meta device and leaves the weights of seed 0."""

    recompute: bool
    """Keep only each block's input, and compute the block again in backward."""

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Draw every weight anew, as a function of (seed, name): after `to_empty`, the weights of a direct construction."""

    @abstractmethod
    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        context: TokenContext | None = None,
        *,
        return_logits: bool = False,
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

    def num_parameters(self) -> flops.Parameters:
        """Counted from shapes, over all experts even where this rank holds a part of them; works on the meta device."""
        return flops.parameters(self)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of this length; training takes three times as many. See `dmoe.models.size`."""
        return flops.flops_per_token(self, seq_len)


IGNORE = -100
"""A target that is not predicted and counts nowhere in the loss."""


@dataclass
class ModelOutput:
    logits: Tensor | None
    """[B, S, V] in the dtype of the output projection; None where there are targets, unless asked for."""
    loss_sum: Tensor | None
    """Scalar float32 (float64 for a float64 model): the sum of the cross-entropy in nats over the targets that are not ignored."""
    aux: list[dict[str, Tensor]] = field(default_factory=list)
    """For each MoE layer its auxiliary losses, raw (no coefficient), by name; see `dmoe.moe.balance`."""
    stats: list[LayerStats] = field(default_factory=list)
    """For each MoE layer what it counted."""
    loss_T: Tensor | None = None
    """In evaluation, with targets: the cross-entropy of each; 0 where it is ignored."""
    correct_T: Tensor | None = None
    """In evaluation, with targets: whether the best guess is right."""
    module_aux: list[dict[str, Tensor]] = field(default_factory=list)
    """In training, for each place with modules: the losses of its router, raw, by name; none where routing is given."""
    module_stats: list[LayerStats] = field(default_factory=list)
    """In training, for each place with modules what it counted."""


register_dataclass(
    ModelOutput
)  # FSDP2 before torch 2.13 looks for tensors in pytrees only, and misses a backward without a word


class TokenLosses(NamedTuple):
    loss_sum: Tensor
    loss_T: Tensor | None
    correct_T: Tensor | None


def token_losses(logits: Tensor, target: Tensor, one_by_one: bool) -> TokenLosses:
    """The sum of `-log softmax(logits)[target]` over the targets that are not ignored, at least float32; `one_by_one`, also each.

    logits [B, S, V]; target int64 [B, S].
    """
    logits_TV, target_T = logits.flatten(0, 1), target.flatten()
    wide_TV = logits_TV.to(torch.promote_types(logits.dtype, torch.float32))
    if not one_by_one:
        return TokenLosses(
            F.cross_entropy(wide_TV, target_T, ignore_index=IGNORE, reduction="sum"), None, None
        )
    nats_T = F.cross_entropy(wide_TV, target_T, ignore_index=IGNORE, reduction="none")
    return TokenLosses(nats_T.sum(), nats_T, wide_TV.argmax(-1) == target_T)
