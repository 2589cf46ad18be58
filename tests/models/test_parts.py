"""Each part of the transformer against its naive reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck

from dmoe.bench.measure import peak_bytes
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import ModelConfig, MoEConfig, RouterConfig, TrainConfig
from dmoe.models import base
from dmoe.models.attention import (
    Attention,
    apply_rotary,
    causal_attention,
    rotary_table,
    unfused_causal_attention,
)
from dmoe.models.layers import RMSNorm
from dmoe.models.transformer import Transformer
from dmoe.moe.experts import grouped_mlp
from dmoe.train.engine import offloads
from tests.references.models import (
    apply_rotary_reference,
    causal_attention_reference,
    rms_norm_reference,
)

ONE = RouterConfig(renormalize=False)


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


def test_the_backward_of_a_norm_makes_one_tensor_of_its_size():
    norm, x = RMSNorm(64, 1e-5), torch.randn(512, 64, requires_grad=True)
    out, grad = norm(x), torch.randn(512, 64)
    leaves = (x, norm.weight)
    rise = peak_bytes(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert x.nbytes <= rise < 1.2 * x.nbytes


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


def test_each_step_of_recomputation_keeps_less_for_the_backward():
    """Storages that autograd saves in one forward, each once; CUDA's three steps, on a CPU."""
    config = ModelConfig(dim=32, layers=2, heads=2, tie_embeddings=True)
    token = torch.randint(50, (2, 16))
    kept = {}
    for mode in ("none", "activation", "experts", "block"):
        model = Transformer(config, MoEConfig(4, 2, 48), 50, recompute=mode)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            # without the last argument, which is for an exchange that overlaps
            steps = grouped_mlp.feed_forward_in_steps
            patch.setattr(
                grouped_mlp, "feed_forward", lambda *given, steps=steps: steps(*given[:-1])
            )
            patch.setattr(grouped_mlp.MLPExperts, "takes_tokens", False)
            loss = model(token, token).loss_sum
        assert loss is not None
        kept[mode] = sum(
            t.untyped_storage().nbytes() for p, t in saved.items() if p not in parameters
        )
    assert kept["none"] > kept["activation"] > kept["experts"] > 1.5 * kept["block"]
    assert kept["none"] - kept["activation"] == 2 * (2 * 32) * 48 * 4  # layers x rows x F x float32


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("counts", [[3, 0, 5, 2], 4])
def test_a_recomputed_activation_gives_the_same_bits(kind, counts):
    count = counts if isinstance(counts, int) else torch.tensor(counts)
    rows = torch.randn(4 * counts if isinstance(counts, int) else sum(counts), 6)
    width = 2 * 7 if kind == "swiglu" else 7
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        leaves = [rows.clone(), torch.randn(4, 6, width), torch.randn(4, 7, 5)]
        x, w_in, w_out = (leaf.requires_grad_() for leaf in leaves)
        y = grouped_mlp.feed_forward_in_steps(kind, x, w_in, w_out, count, again)
        y.square().sum().backward()
        found.append((y, *(leaf.grad for leaf in leaves)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_an_offload_asks_for_pinned_memory_on_a_gpu_and_is_refused_on_a_cpu():
    asked = []

    def save_on_cpu(pin_memory):
        asked.append(pin_memory)
        return nullcontext()

    config = replace(load(None), train=TrainConfig(offload="activations"))
    with pytest.raises(ConfigError, match=r"train\.offload=activations: needs a GPU"):
        offloads(config, torch.device("cpu"))
    model = Transformer(ModelConfig(dim=8, layers=1, heads=1), MoEConfig(2, 1, 8, router=ONE), 9)
    model.offload = offloads(config, torch.device("cuda"))
    token = torch.randint(9, (1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "save_on_cpu", save_on_cpu)
        model(token, token)
        x, rotary = (
            torch.randn(1, 4, 8),
            rotary_table(4, 8, 1e4, torch.float32, torch.device("cpu")),
        )
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
        model.run_block(lambda *args: None, x, rotary)
        with torch.no_grad():
            model.run_block(lambda *args: None, x, rotary)
    assert asked == [False, True]
