"""The model interface of the trainer, `verify` and `explain`: output, losses, size and FLOPs.

Letters: B samples of a batch, S positions per sample, V outputs (vocabulary or classes), T = B*S,
D model width, H query heads, A width of a head, E experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.export import register_dataclass
from torch.utils.checkpoint import checkpoint

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config
from dmoe.models.attention import Attention
from dmoe.models.fusion import GatedFusion
from dmoe.models.layers import BlockOutput
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.experts import MLPExperts
from dmoe.moe.inputs import as_int64
from dmoe.moe.interfaces import ExpertLayer
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext

IGNORE_INDEX = -100
"""Target that is not predicted and not counted in the loss."""


class Model(nn.Module, ABC):
    """A network with MoE layers.

    The constructor works on the meta device and leaves the weights of seed 0.
    """

    recompute: str = "none"
    """See `train.recompute`."""
    offload: bool = False
    """Keep what blocks save for the backward in main memory."""
    notes: Sequence[str] = ()
    """What a run says about the model at its start."""
    reads_positions: bool = False
    """Whether `forward` limits attention by `context.position_T`, as `data.document_mask` needs:
    a token sees no token before the last position 0 of its sequence."""

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Draw all weights as a function of (seed, name); usable after `to_empty`."""

    @abstractmethod
    def forward(
        self,
        input: Tensor,
        target: Tensor | None = None,
        context: TokenContext | None = None,
        *,
        return_logits: bool = False,
    ) -> ModelOutput:
        """Compute logits without targets, losses with targets.

        Args:
            input: [B, ...].
            target: int64 [B, S], one per position; IGNORE_INDEX is not predicted.
            context: labels, padding and positions in documents of the tokens.
            return_logits: return logits although there are targets.
        """

    def run_block(self, block: nn.Module, *args: object) -> BlockOutput:
        """Apply a block, with the recomputation and the offload that are set."""
        if not torch.is_grad_enabled():
            return block(*args)  # type: ignore[no-any-return]
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in args)
        with save_on_cpu(pin_memory=on_gpu) if self.offload else nullcontext():
            if self.recompute != "block":
                return block(*args)  # type: ignore[no-any-return]
            # Random numbers in a block are keyed, so there is no generator state to preserve.
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            return again(block, *args)  # type: ignore[no-any-return]

    def set_recompute(self, mode: str | bool) -> None:
        """Set what the backward computes again, `train.recompute`; True and False are old modes."""
        old = "block" if mode else "none"
        self.recompute = old if isinstance(mode, bool) else mode
        for layer in self.moe_layers():
            layer.recompute_experts = self.recompute == "experts"
            for part in layer.experts.modules():
                if isinstance(part, MLPExperts):
                    part.recompute_activation = self.recompute == "activation"

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in order; element l has `layer == l`."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def num_parameters(self) -> ParameterCounts:
        """Count parameters from shapes, over the experts of all ranks; works on the meta device."""
        return count_parameters(self)

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward FLOPs per token at this sequence length; training takes 3 times as many."""
        return flops_per_token(self, seq_len)


@dataclass
class ModelOutput:
    """Logits, losses and counts of one forward."""

    logits: Tensor | None
    """[B, S, V] in the dtype of the output projection; None with targets, unless requested."""
    loss_sum: Tensor | None
    """Sum of the cross-entropy in nats over all predicted targets: scalar float32 (float64 for a
    float64 model)."""
    aux: list[dict[str, Tensor]] = field(default_factory=list)
    """Auxiliary losses of each MoE layer by name, without coefficients; see
    `dmoe.moe.load_balancing`."""
    stats: list[LayerStats] = field(default_factory=list)
    """Counts of each MoE layer."""
    loss_T: Tensor | None = None
    """In evaluation, with targets: the cross-entropy of each target; 0 if ignored."""
    correct_T: Tensor | None = None
    """In evaluation, with targets: True if the most likely output is the target."""
    module_aux: list[dict[str, Tensor]] = field(default_factory=list)
    """In training, per target module with adapters: the losses of its router by name, without
    coefficients; empty if the routing is given."""
    module_stats: list[LayerStats] = field(default_factory=list)
    """In training, per target module with adapters: its counts."""


# Before torch 2.13, FSDP2 looks for tensors in pytrees only and silently misses a backward.
register_dataclass(ModelOutput)


class TokenLosses(NamedTuple):
    """Cross-entropy of the targets; see `ModelOutput`."""

    loss_sum: Tensor
    loss_T: Tensor | None
    correct_T: Tensor | None


def token_losses(logits: Tensor, target: Tensor, per_token: bool) -> TokenLosses:
    """Sum `-log softmax(logits)[target]` over the predicted targets, in float32 at least.

    Args:
        logits: [B, S, V].
        target: integers [B, S].
        per_token: return the loss and the correctness of each target too.
    """
    logits_TV, target_T = logits.flatten(0, 1), as_int64("target", target).flatten()
    wide_TV = logits_TV.to(torch.promote_types(logits.dtype, torch.float32))
    if not per_token:
        loss_sum = F.cross_entropy(wide_TV, target_T, ignore_index=IGNORE_INDEX, reduction="sum")
        return TokenLosses(loss_sum, None, None)
    loss_T = F.cross_entropy(wide_TV, target_T, ignore_index=IGNORE_INDEX, reduction="none")
    return TokenLosses(loss_T.sum(), loss_T, wide_TV.argmax(-1) == target_T)


def check_own_model(model: nn.Module, config: Config) -> None:
    """Prepare a model of the user's for the trainer, which does what its layers do not need to.

    Raises:
        ConfigError: it is no `Model`, or its MoE layers are not those of the config.
    """
    name = type(model).__name__
    if not isinstance(model, Model):
        why = "must be a subclass of dmoe.Model"
        raise ConfigError("model", name, why, "derive from it, or use dmoe.parallelize")
    if config.modular.bank != "none":
        why = "attaches modules to the model of the config"
        raise ConfigError("modular.bank", config.modular.bank, why, "leave it out, or model=")
    for index, layer in enumerate(model.moe_layers()):
        if (layer.layer, layer.balance) != (index, config.moe.balance):
            why = "its MoE layers must have layer=0, 1, ... in order, and the balance of the config"
            fix = "make them with dmoe.MoE.from_config(config.moe, dim, layer=index)"
            raise ConfigError("model", name, why, fix)
        layer.virtual_ranks, layer.pending_counts = config.parallel.virtual_ranks, None


class ParameterCounts(NamedTuple):
    """Numbers of parameters of a model."""

    total: int
    """All weights; every expert counts once, on whichever rank it is."""
    active: int
    """Weights that one token uses (one sample, of a table): all but the E-K experts of each MoE
    layer that it does not choose. If experts differ in size: the most that K of them have and a
    budget allows. Encoders of streams: all."""
    trainable: int
    """Part of `total` that is not frozen."""
    embedding: int
    """Part of `total` and `active`: the token embedding, which is also the output projection if
    they are tied."""


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a model with MoE layers, with or without adapters attached."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    adapters = [
        module
        for module in model.modules()
        if isinstance(module, ExpertLayer) and not isinstance(module, MoELayer)
    ]
    stacks: list[nn.Module] = [layer.experts for layer in layers]
    stacks += [layer.experts for layer in adapters]
    experts = {id(p) for stack in stacks for p in stack.parameters()}
    dense = [p for p in model.parameters() if id(p) not in experts]
    num_dense = sum(p.numel() for p in dense)
    # A weight of an expert is one multiply-add; the counts are those of all ranks.
    layer_size = {layer: sum(layer.weights_of_experts) for layer in layers}
    adapter_size = {layer: _adapter_weights(layer) for layer in adapters}
    sizes = [*layer_size.values(), *adapter_size.values()]
    encoders = {module.encoders for module in model.modules() if isinstance(module, GatedFusion)}
    active = num_dense
    for layer, size in layer_size.items():
        active += size if layer in encoders else layer.max_active_weights()
    for adapter, size in adapter_size.items():
        active += size * adapter.router.top_k // adapter.router.num_experts
    trainable = sum(p.numel() for p in dense if p.requires_grad)
    trainable += sum(
        size for size, stack in zip(sizes, stacks, strict=True) if _is_trainable(stack)
    )
    embedding = getattr(model, "embedding", None)
    num_embedding = embedding.weight.numel() if isinstance(embedding, nn.Embedding) else 0
    return ParameterCounts(num_dense + sum(sizes), active, trainable, num_embedding)


def _adapter_weights(layer: ExpertLayer) -> int:
    """Count the adapter weights of a layer over all ranks; each parameter stacks its adapters."""
    num_adapters = layer.router.num_experts
    return sum(p.numel() // len(p) * num_adapters for p in layer.experts.parameters())


def _is_trainable(experts: nn.Module) -> bool:
    """Return whether the experts of one layer are trained: all of them are, or none."""
    return any(p.requires_grad for p in experts.parameters())


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Count forward FLOPs of the matrix products per token; backward takes twice as many.

    Two FLOPs per multiply-add: `2 * (active weights without the embedding table) + 2 * V * D +
    4 * H * A * (S + 1)/2` per attention. A causal token attends to (S + 1)/2 tokens on average
    (Kaplan et al. 2020 leave attention out, PaLM counts S; both differ little while S << D).
    Norms, softmax, rotary positions and dropped assignments are ignored.
    """
    count = count_parameters(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    # A tied embedding table is the output projection too; an untied one is only looked up.
    tied = getattr(model, "output", None) is None
    matrices = count.active - vectors - (0 if tied else count.embedding)
    attention = sum(m.num_heads * m.head_dim for m in model.modules() if isinstance(m, Attention))
    return 2 * matrices + 2 * attention * (seq_len + 1)
