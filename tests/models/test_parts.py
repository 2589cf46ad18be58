"""Each part of the transformer against its naive reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from dmoe.config.schema import ModelConfig
from dmoe.models.attention import (
    Attention,
    apply_rotary,
    causal_attention,
    rotary_table,
    unfused_causal_attention,
)
from dmoe.models.layers import RMSNorm
from tests.references.models import (
    apply_rotary_reference,
    causal_attention_reference,
    rms_norm_reference,
)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )


def test_rms_norm_equals_its_formula_and_its_gradient_is_right():
    norm, x = RMSNorm(6, 1e-5).double(), randn(2, 3, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 6))
    torch.testing.assert_close(norm(x), rms_norm_reference(x, norm.weight, 1e-5))
    assert gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
    )


def test_rms_norm_computes_bfloat16_input_in_float32():
    norm, x = RMSNorm(64, 1e-5), randn(4, 64).detach().bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(
        norm(x), rms_norm_reference(x.float(), norm.weight, 1e-5).bfloat16(), rtol=0, atol=0
    )


def test_rotate_is_a_complex_multiplication_and_its_gradient_is_right():
    x = randn(2, 5, 3, 8)
    table = rotary_table(5, 8, 100.0, x.dtype, x.device)
    torch.testing.assert_close(
        apply_rotary(x, table), apply_rotary_reference(x, 100.0), rtol=1e-12, atol=1e-12
    )
    assert gradcheck(lambda x: apply_rotary(x, table), (x[:1, :, :2],))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attend", [causal_attention, unfused_causal_attention])
def test_attention_equals_one_query_at_a_time(attend, kv_heads):
    """Tests the fused kernel, and the matrix products that replace it on a CPU."""
    q, k, v = randn(2, 7, 4, 6), randn(2, 7, kv_heads, 6), randn(2, 7, kv_heads, 6)
    expected = causal_attention_reference(q, k, v)
    torch.testing.assert_close(attend(q, k, v), expected)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    got = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ModelConfig(dim=10, heads=4), "model.heads"),
        (ModelConfig(dim=16, heads=4, kv_heads=3), "model.kv_heads"),
        (ModelConfig(dim=12, heads=4), "model.head_dim"),
    ],
)
def test_impossible_heads_are_refused_with_the_field(config, field):
    with pytest.raises(ValueError, match=field):
        Attention(config)


def test_the_sum_of_squares_stays_float32_under_autocast() -> None:
    """Autocast runs `vecdot` in bfloat16, which rounded every norm on the CPU to 8 bits."""
    norm, x = RMSNorm(64, 1e-5), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    torch.testing.assert_close(inside, norm(x), rtol=1e-6, atol=1e-6)
