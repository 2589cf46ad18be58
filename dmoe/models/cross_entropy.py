"""Output projection and cross-entropy in chunks of tokens, so that the logits are never whole.

    loss_t = logsumexp(z_t) - z_t[target_t]   with   z_t = W x_t
    dz_t = softmax(z_t) - onehot(target_t);   dx_t = W^T dz_t;   dW = sum_t dz_t x_t^T

The logits of a chunk are made, turned into their gradient in place, multiplied by W and by x, and
overwritten by the next chunk's, all in the forward (Hsu et al. 2024, "Liger Kernel"); the backward
only multiplies by the gradient of the loss. So the three matrix products are those of the plain
form and nothing is computed twice. Kept for backward: dx [T, D] and dW [V, D], which the plain
backward makes too, instead of [T, V] logits, log-probabilities and their gradient.

Cost: 3 matrix products. Memory beside x and W: `chunk_rows(V)` x V numbers, twice in float32 (and
twice in the dtype of the product if that is narrower): at V = 151,936 0.9 GB instead of the 17 GB
of 8,192 tokens. No collective, no host read.

Letters: T tokens, D model width, V vocabulary size, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dmoe.models.base import IGNORE_INDEX, TokenLosses
from dmoe.moe.dispatch import without_autocast
from dmoe.moe.inputs import as_int64, first_derivative_only

CHUNK_ELEMENTS, MIN_ROWS = 1 << 22, 512
"""A chunk has about 4 M logits (16 MB), and rows enough for a matrix product at full speed."""


def chunk_rows(num_outputs: int) -> int:
    """Return C for a vocabulary of V."""
    return max(MIN_ROWS, CHUNK_ELEMENTS // num_outputs)


def linear_token_losses(
    x_BSD: Tensor, weight_VD: Tensor, target_BS: Tensor, per_token: bool
) -> TokenLosses:
    """Compute `token_losses(F.linear(x, weight), target, per_token)` chunk by chunk.

    The products are in autocast's dtype, the rest, and the sum of the chunks' dW, in float32 at
    least. Equality: that of another order of summation (1e-12 in float64, 1e-6 in float32). There
    is no second derivative.

    Args:
        x_BSD: normalized output of the last block.
        weight_VD: the output projection.
        target_BS: integers; IGNORE_INDEX is not predicted.
        per_token: return the loss and the correctness of each target too; without gradients.
    """
    x_TD, target_T = x_BSD.flatten(0, 1), as_int64("target", target_BS).flatten()
    device = x_TD.device.type
    if not x_TD.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, weight_VD = x_TD.to(dtype), weight_VD.to(dtype)
    with without_autocast(x_TD):
        if per_token:
            return _evaluate(x_TD, weight_VD, target_T)
        return TokenLosses(_loss_sum(x_TD, weight_VD, target_T), None, None)


class _Chunks:
    """The buffers of all chunks of one forward."""

    def __init__(self, x_TD: Tensor, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD
        rows, num_outputs = min(len(x_TD), chunk_rows(len(weight_VD))), len(weight_VD)
        self.wide = torch.promote_types(x_TD.dtype, torch.float32)
        self.logit_CV = x_TD.new_empty(rows, num_outputs)
        self.log_prob_CV = x_TD.new_empty(rows, num_outputs, dtype=self.wide)

    def log_probs(self, x_CD: Tensor) -> Tensor:
        """Return [C, V], overwritten by the next call; `logit_CV` holds the logits."""
        logit_CV, log_prob_CV = self.logit_CV[: len(x_CD)], self.log_prob_CV[: len(x_CD)]
        torch.mm(x_CD, self.weight_VD.t(), out=logit_CV)
        wide_CV = logit_CV.to(self.wide)
        torch.ops.aten._log_softmax.out(wide_CV, -1, False, out=log_prob_CV)
        return log_prob_CV


def _target_losses(log_prob_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, ids [C, 1] and whether there is a target, of one chunk."""
    valid_C = target_C != IGNORE_INDEX
    id_C1 = target_C.clamp(min=0).unsqueeze(1)
    loss_C = log_prob_CV.gather(1, id_C1).squeeze(1).neg().masked_fill_(~valid_C, 0.0)
    return loss_C, id_C1, valid_C


def _evaluate(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> TokenLosses:
    chunks, rows = _Chunks(x_TD, weight_VD), chunk_rows(len(weight_VD))
    losses, correct = [], []
    for start in range(0, len(x_TD), rows):
        x_CD, target_C = x_TD[start : start + rows], target_T[start : start + rows]
        log_prob_CV = chunks.log_probs(x_CD)
        losses.append(_target_losses(log_prob_CV, target_C)[0])
        correct.append(chunks.logit_CV[: len(x_CD)].argmax(-1) == target_C)
    loss_T = torch.cat(losses)
    return TokenLosses(loss_T.sum(), loss_T, torch.cat(correct))


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        chunks, rows = _Chunks(x_TD, weight_VD), chunk_rows(len(weight_VD))
        loss = x_TD.new_zeros((), dtype=chunks.wide)
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        grad_weight_VD = None
        if needs_weight:
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=chunks.wide)
        for start in range(0, len(x_TD), rows):
            part = slice(start, start + rows)
            x_CD = x_TD[part]
            log_prob_CV = chunks.log_probs(x_CD)
            loss_C, id_C1, valid_C = _target_losses(log_prob_CV, target_T[part])
            loss += loss_C.sum()
            if not needs_x and not needs_weight:
                continue
            grad_CV = log_prob_CV.exp_()
            grad_CV.scatter_(1, id_C1, grad_CV.gather(1, id_C1) - 1)
            _clear_rows(grad_CV, valid_C)
            if grad_CV.dtype != x_TD.dtype:
                grad_CV = chunks.logit_CV[: len(x_CD)].copy_(grad_CV)
            if grad_x_TD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_x_TD[part])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV, x_CD)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        if grad_x_TD is not None:
            # a scalar of float32 is not rounded to bfloat16 before it multiplies
            grad_x_TD = grad_x_TD * grads[0]
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grads[0]).to(ctx.weight_dtype)
        return grad_x_TD, grad_weight_VD, None


_loss_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = _LinearCrossEntropy.apply


def _clear_rows(grad_CV: Tensor, valid_C: Tensor) -> None:
    """Set the rows without a target to 0, whatever they hold: a product would keep a NaN.

    On a CPU only those rows are touched; elsewhere their number would be a host read, and fake
    tensors have none.
    """
    if grad_CV.device.type == "cpu" and type(grad_CV) is Tensor:
        grad_CV.index_fill_(0, (~valid_C).nonzero().squeeze(1), 0.0)
    else:
        grad_CV.masked_fill_(~valid_C.unsqueeze(1), 0.0)


def _add_product(grad_weight_VD: Tensor, grad_CV: Tensor, x_CD: Tensor) -> None:
    """Add `grad^T @ x` in the dtype of the sum."""
    if grad_CV.dtype == grad_weight_VD.dtype:
        grad_weight_VD.addmm_(grad_CV.t(), x_CD)
    else:
        grad_weight_VD.add_(grad_CV.t() @ x_CD)
