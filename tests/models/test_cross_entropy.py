"""Cross-entropy in chunks, against the plain form: losses, gradients, ignored targets, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.models import cross_entropy
from dmoe.models.base import IGNORE_INDEX, token_losses
from dmoe.models.cross_entropy import linear_token_losses


def both(x, weight, target, scale=0.37):
    """Return the loss and both gradients of the chunked and of the plain form."""
    found = []
    for chunked in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        if chunked:
            loss = linear_token_losses(*leaves, target, False).loss_sum
        else:
            loss = token_losses(F.linear(*leaves), target, False).loss_sum
        (loss * scale).backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(2, 40), st.integers(1, 7), st.data())
def test_chunks_give_the_loss_and_the_gradients_of_the_plain_form(
    batch, length, outputs, rows, data
):
    seed = data.draw(st.integers(0, 1 << 20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 5, generator=generator, dtype=torch.float64) * 4
    weight = torch.randn(outputs, 5, generator=generator, dtype=torch.float64) * 4
    target = torch.randint(outputs, (batch, length), generator=generator)
    target[torch.rand(batch, length, generator=generator) < 0.3] = IGNORE_INDEX
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "MIN_ROWS", rows)
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
        for one, other in zip(*both(x, weight, target), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        per_token = linear_token_losses(x, weight, target, True)
    plain = token_losses(F.linear(x, weight), target, True)
    torch.testing.assert_close(per_token.loss_T, plain.loss_T, rtol=1e-12, atol=1e-12)
    assert torch.equal(per_token.correct_T, plain.correct_T)


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x = torch.randn(1, 4, 3).requires_grad_(frozen == "weight")
    weight = torch.randn(6, 3).requires_grad_(frozen == "x")
    loss = linear_token_losses(x, weight, torch.tensor([[1, 2, 3, 4]]), False).loss_sum
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    assert (x.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "x")


def test_a_row_that_is_not_predicted_may_hold_anything():
    x = torch.randn(1, 4, 3)
    x[0, 2] = torch.nan
    leaves = x.requires_grad_(), torch.randn(6, 3).requires_grad_()
    loss = linear_token_losses(*leaves, torch.tensor([[1, 2, IGNORE_INDEX, 4]]), False).loss_sum
    loss.backward()
    assert loss.isfinite()
    assert (leaves[0].grad[0, 2] == 0).all()


def test_bfloat16_is_as_close_to_float64_as_the_plain_form():
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(1, 700, 64, generator=generator),
        torch.randn(50, 64, generator=generator),
    )
    target = torch.randint(50, (1, 700), generator=generator)
    exact = both(x.double(), weight.double(), target)[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = both(x, weight, target)
    for chunked, plain, true in zip(*found, exact, strict=True):
        errors = [(value.double() - true).norm() / true.norm() for value in (chunked, plain)]
        assert errors[0] < 1.1 * errors[1] + 1e-6
        assert errors[0] < 0.01


def test_no_tensor_holds_the_logits_of_all_tokens():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    x, weight = torch.empty(1, 8192, 8, device="meta"), torch.empty(20_000, 8, device="meta")
    target = torch.empty(1, 8192, dtype=torch.int64, device="meta")
    with Largest() as seen:
        loss = linear_token_losses(x.requires_grad_(), weight.requires_grad_(), target, False)
        loss.loss_sum.backward()
    assert seen.size == cross_entropy.chunk_rows(20_000) * 20_000 < 8192 * 20_000 / 15
