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

from dmoe.models.attention import Attention
from dmoe.models.fusion import GatedFusion
from dmoe.models.layers import BlockOutput
from dmoe.moe.interfaces import ExpertLayer
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

    def num_parameters(self) -> Parameters:
        """Counted from shapes, over all experts even where this rank holds a part of them; works on the meta device."""
        return parameters(self)

    def flops_per_token(self, seq_len: int) -> int:
        """Forward FLOPs of one token in a sequence of this length; training takes three times as many. See `dmoe.models.size`."""
        return flops_per_token(self, seq_len)


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


class Parameters(NamedTuple):
    total: int
    """All weights, every expert counted once wherever it lives."""
    active: int
    """Those one token (one sample, of a table) passes: all but the E-K experts of each MoE layer that it does not choose. Where
    experts differ, the most that K of them have and a budget allows. Encoders of streams: all."""
    trained: int
    """Of `total`, those that are not frozen."""
    embedding: int
    """Of `total` and `active`, the token embedding; it is the output projection too if they are tied."""


def parameters(model: nn.Module) -> Parameters:
    """Parameters of a model with MoE layers, any module with an `embedding`, with or without modules attached."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    banks = [
        module
        for module in model.modules()
        if isinstance(module, ExpertLayer) and not isinstance(module, MoE)
    ]
    stacks: list[nn.Module] = [
        *(layer.experts for layer in layers),
        *(layer.experts for layer in banks),
    ]
    experts = {id(p) for stack in stacks for p in stack.parameters()}
    rest = [p for p in model.parameters() if id(p) not in experts]
    modules = {layer: _all_modules(layer) for layer in banks}
    dense = sum(p.numel() for p in rest)
    total = (
        dense + sum(modules.values()) + sum(sum(layer.experts.multiply_adds) for layer in layers)
    )
    encoders = {module.encoders for module in model.modules() if isinstance(module, GatedFusion)}
    active = dense + sum(
        sum(layer.experts.multiply_adds) if layer in encoders else _most_active(layer)
        for layer in layers
    )
    active += sum(
        size * layer.router.top_k // layer.router.num_experts for layer, size in modules.items()
    )
    trained = sum(p.numel() for p in rest if p.requires_grad) + sum(
        n for layer, n in modules.items() if _trained(layer.experts)
    )
    trained += sum(sum(layer.experts.multiply_adds) for layer in layers if _trained(layer.experts))
    embedding = getattr(model, "embedding", None)
    return Parameters(
        total,
        active,
        trained,
        embedding.weight.numel() if isinstance(embedding, nn.Embedding) else 0,
    )


def _all_modules(bank: ExpertLayer) -> int:
    """Weights of a bank of modules, over all ranks: each of its parameters is a stack of the modules of this one."""
    return sum(p.numel() // len(p) * bank.router.num_experts for p in bank.experts.parameters())


def _trained(experts: nn.Module) -> bool:
    """Of the experts of one layer all are trained or none."""
    return any(p.requires_grad for p in experts.parameters())


def _most_active(layer: MoE) -> int:
    """Weights of the K largest experts of all ranks, or what the budget buys where that is less: a weight is a multiply-add."""
    work = sorted(layer.experts.multiply_adds, reverse=True)
    largest, config = sum(work[: layer.router.top_k]), layer.router.config
    return min(largest, int(config.budget * sum(work))) if config.kind == "budget" else largest


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Forward FLOPs of the matrix products for one token, two for each multiply-add; backward takes twice as many.

    `2 * (active weights without the embedding table) + 2 * vocabulary * D + 4 * H * A * (S + 1)/2` for each attention: a causal
    token sees (S + 1)/2 others on average (Kaplan et al. 2020 leave the attention out, PaLM counts S; both differ little while
    S << D). Norms, softmax, rotary positions and dropped choices are not subtracted or added.
    """
    count = parameters(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    tied = (
        getattr(model, "output", None) is None
    )  # then the table is multiplied by as well; else it is only looked up
    matrices = count.active - vectors - (0 if tied else count.embedding)
    attended = sum(m.heads * m.head_dim for m in model.modules() if isinstance(m, Attention))
    return 2 * matrices + 2 * attended * (seq_len + 1)
