"""Parts of a block that all models share: RMSNorm, the feed-forward (dense or MoE), the output.

`torch.rms_norm` is one fused kernel on CUDA, but on the CPU it is a chain of elementwise operations
whose backward autograd derives step by step. `_RMSNorm` writes the backward explicitly, with one
new tensor of the input's size forward and one backward: memory costs more than arithmetic there.

Letters: B sequences, S tokens per sequence, D model width (the last dimension).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dmoe.config.expert_shapes import dense_kind
from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.moe.dispatch import without_autocast
from dmoe.moe.experts import FeedForward
from dmoe.moe.inputs import first_derivative_only
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import TokenContext


class RMSNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019).

    [..., D] -> [..., D] in the input's dtype; computed in float32 at least.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return fused_rms_norm(x, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.eps)

    def initialize(self) -> None:
        nn.init.ones_(self.weight)


def fused_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Compute `RMSNorm` in one kernel, for CUDA.

    The weight stays float32: near 1, bfloat16 has steps of 2^-7. Autocast would do the same for
    this function and return float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        out = F.rms_norm(x.to(dtype), weight_D.shape, weight_D.to(dtype), eps)
    return out.to(x.dtype)


class _RMSNorm(Function):
    """With r = rstd: dx = r (g w - x r^2 mean(g w x)) and dw = sum over rows of g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # not `vecdot`, which writes the squares; a norm is one pass that only reads
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rstd)
        out: Tensor = (wide * rstd).mul_(weight_D).to(x.dtype)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rstd = ctx.saved_tensors
        wide, grad = x.to(rstd.dtype), grads[0].to(rstd.dtype)
        weight = weight_D.to(rstd.dtype)
        buffer = grad * wide
        mean = (buffer @ weight).div_(x.shape[-1]).unsqueeze(-1)
        grad_weight = buffer.mul_(rstd).flatten(0, -2).sum(0).to(weight_D.dtype)
        share = mean.mul_(rstd).mul_(rstd)
        grad_x = torch.mul(grad, weight, out=buffer).addcmul_(wide, share, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None


_rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _RMSNorm.apply


class BlockOutput(NamedTuple):
    """Output of a block. A tuple, because DDP and checkpointing look for tensors inside tuples."""

    x_BSD: Tensor
    aux: dict[str, Tensor] | None
    """Auxiliary losses of a sparse block by name, without coefficients; None for a dense block."""
    stats: LayerStats | None


def dense_hidden_dim(config: ModelConfig, moe: MoEConfig) -> int:
    """Return the hidden width of a dense feed-forward.

    Without `dense_dim` it is the number of hidden units that a token uses in a MoE layer: those of
    its K experts and of the shared ones.
    """
    if config.dense_dim is not None:
        return config.dense_dim
    shared_dim = moe.expert_dim if moe.experts.shared_dim is None else moe.experts.shared_dim
    return moe.top_k * moe.expert_dim + moe.experts.shared * shared_dim


def dense_feed_forward(config: ModelConfig, moe: MoEConfig) -> FeedForward:
    """Build the dense feed-forward of a block, with the activation of the experts."""
    hidden_dim = dense_hidden_dim(config, moe)
    return FeedForward(dense_kind(moe.experts), config.dim, hidden_dim, config.dim)


def run_feed_forward(layer: nn.Module, x_BSD: Tensor, context: TokenContext) -> BlockOutput:
    """Apply a layer that may be a MoE layer."""
    if isinstance(layer, MoE):
        out = layer(x_BSD, context)
        return BlockOutput(out.y, out.aux, out.stats)
    return BlockOutput(layer(x_BSD), None, None)


def initialize_feed_forward(
    layer: FeedForward | MoE, seed: int, name: str, std: float, out_std: float
) -> None:
    """Draw the weights of a block's feed-forward.

    Args:
        layer: dense or MoE.
        seed: key of the draw.
        name: path of the layer in the model; a MoE layer uses its index among the MoE layers.
        std: of weights that read the residual stream.
        out_std: of weights that write to it.
    """
    if isinstance(layer, MoE):
        layer.initialize(seed, std, out_std)
    else:
        layer.initialize(seed, name, std, out_std)
