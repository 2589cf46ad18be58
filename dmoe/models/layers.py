"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.moe.metrics import LayerStats


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
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return _rms_norm(x, self.weight, self.eps)

    def initialize(self) -> None:
        nn.init.ones_(self.weight)


class _RMSNorm(Function):
    """With n = x * rstd: dx = rstd * (g w - n mean(g w n)) and dw = sum over rows of g n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(
            x.device.type, enabled=False
        ):  # autocast would take vecdot to bf16, also in here
            rstd = (
                torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
            )
        ctx.save_for_backward(x, weight_D, rstd)
        out: Tensor = (wide * rstd).mul_(weight_D).to(x.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rstd = ctx.saved_tensors
        normed = x * rstd  # rstd is wide, so this and all below is too
        grad = grads[0].to(normed.dtype)
        weight = weight_D.to(normed.dtype)
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight_D.dtype)
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None


_rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _RMSNorm.apply


class BlockOutput(NamedTuple):
    """A tuple and not a dataclass: DDP and checkpointing look for tensors inside tuples."""

    x_BSD: Tensor
    aux: dict[str, Tensor] | None
    """The auxiliary losses of a sparse block, raw, by name; None for a dense one."""
    stats: LayerStats | None


def is_sparse(config: ModelConfig, index: int) -> bool:
    """Block `index` is a mixture of experts: every `moe_every`-th one after the first `dense_first`."""
    if config.moe_every <= 0 or index < config.dense_first:
        return False
    return (index - config.dense_first + 1) % config.moe_every == 0


def active_hidden_dim(moe: MoEConfig) -> int:
    """Hidden units a token passes in a MoE layer: of its K experts and of the shared ones."""
    shared_dim = moe.expert_dim if moe.experts.shared_dim is None else moe.experts.shared_dim
    return moe.top_k * moe.expert_dim + moe.experts.shared * shared_dim
