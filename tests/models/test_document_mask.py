"""Documents of one sequence do not see each other: equal to each document run alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe.config.errors import ConfigError
from dmoe.config.schema import ModelConfig, MoEConfig
from dmoe.models.attention import (
    Attention,
    causal_attention,
    rotary_table,
    unfused_causal_attention,
    visible_in_document,
)
from dmoe.models.samples import collate_tokens
from dmoe.models.transformer import Transformer
from dmoe.moe.routing import TokenContext
from tests.models.small import batch, gradients, small

LENGTHS = [[10], [3, 7], [1, 1, 5, 3]]
"""Documents of each sequence of `batch()`."""


def positions(lengths: list[list[int]]) -> Tensor:
    return torch.tensor([[p for n in row for p in range(n)] for row in lengths])


def each_document_alone(model: Transformer, token: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and logits of every document as a batch of its own, in order."""
    losses, logits = [], []
    for b, row in enumerate(LENGTHS):
        start = 0
        for n in row:
            part = slice(start, start + n)
            out = model(token[b : b + 1, part], target[b : b + 1, part], return_logits=True)
            assert out.loss_sum is not None
            losses.append(out.loss_sum)
            logits.append(out.logits[0])
            start += n
    return torch.stack(losses).sum(), torch.cat(logits)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "kv_heads": 1}, {"moe_every": 0}])
def test_equals_a_loop_over_documents(options: dict[str, object], recompute: bool) -> None:
    """Logits, loss and all gradients, in float64, with routing and without."""
    token, target = batch()
    model = small(recompute=recompute, **options)
    expected_loss, expected_logits = each_document_alone(model, token, target)
    expected_loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    context = TokenContext(position_T=positions(LENGTHS))
    out = model(token, target, context, return_logits=True)
    assert out.loss_sum is not None
    out.loss_sum.backward()
    torch.testing.assert_close(out.loss_sum, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logits.flatten(0, 1), expected_logits, rtol=1e-12, atol=1e-12)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-11, atol=1e-12)
    assert not torch.equal(model(token).logits.flatten(0, 1), expected_logits), "the test is blind"


@pytest.mark.parametrize("attend", [causal_attention, unfused_causal_attention])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_equals_a_loop_over_documents(attend: object, dtype: torch.dtype) -> None:
    """The unfused one is what a short bfloat16 forward on a CPU takes, with grouped queries."""
    q, k, v = (torch.randn(3, 10, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    position_BS = positions(LENGTHS)
    found = attend(q, k, v, visible_in_document(position_BS))
    weight = torch.randn(3, 10, 4, 8, dtype=dtype)
    grads = torch.autograd.grad(found, (q, k, v), weight)
    rows = []
    for b, lengths in enumerate(LENGTHS):
        parts = zip(*(x[b : b + 1].split(lengths, 1) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([attend(*part) for part in parts], 1))
    expected = torch.cat(rows)
    near = 1e-12 if dtype is torch.float64 else 0.02
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    for grad, other in zip(grads, torch.autograd.grad(expected, (q, k, v), weight), strict=True):
        torch.testing.assert_close(grad, other, rtol=near, atol=2 * near)


def test_rotary_positions_restart() -> None:
    whole = rotary_table(10, 8, 100.0, torch.float64, torch.device("cpu"))
    found = rotary_table(10, 8, 100.0, torch.float64, torch.device("cpu"), positions(LENGTHS))
    for table, part in zip(whole, found, strict=True):
        assert part.shape == (3, 10, 1, 8)
        assert torch.equal(part[1], torch.cat([table[:3], table[:7]]))


def test_a_sequence_of_one_document_takes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused causal kernel is used where no sequence of the batch has a second document."""
    from dmoe.data.sequences.token_masks import TokenMasks

    tokens = torch.zeros(2, 6, dtype=torch.int64).numpy()
    for lengths, plain in (([[5], [5]], True), ([[5], [4, 1]], False)):
        masks = TokenMasks(positions(lengths).numpy())
        samples = collate_tokens(tokens, tokens[:, 0], masks)
        assert (samples.position_BS is None) is plain
    seen: list[object] = []
    forward = Attention.forward
    monkeypatch.setattr(
        Attention, "forward", lambda self, *args: seen.append(args[2]) or forward(self, *args)
    )
    model = Transformer(ModelConfig(dim=8, heads=2, layers=1), MoEConfig(2, 2, 4), 5)
    model(torch.zeros(2, 5, dtype=torch.int64))
    assert seen == [None]


def test_positions_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"position_T=int64\[5\].*\[3, 10\]"):
        small()(batch()[0], None, TokenContext(position_T=torch.arange(5)))
