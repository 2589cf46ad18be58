"""The layer against transformers' Mixtral block with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe import MoE

transformers = pytest.importorskip("transformers", reason="the peer that is compared with")
DIM, HIDDEN, EXPERTS, TOP_K = 16, 24, 6, 2


def mixtral_block() -> torch.nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        router_jitter_noise=0.0,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return block


def copied(block: torch.nn.Module) -> MoE:
    layer = MoE(DIM, HIDDEN, EXPERTS, TOP_K)
    with torch.no_grad():
        layer.router.weight.copy_(block.gate.weight)
        layer.experts.w_in.copy_(block.experts.gate_up_proj.transpose(1, 2))
        layer.experts.w_out.copy_(block.experts.down_proj.transpose(1, 2))
    return layer


def test_forward_and_every_gradient() -> None:
    """Mixtral's router always computes in float32, so the comparison is in float32."""
    block = mixtral_block()
    layer = copied(block)
    x = torch.randn(3, 21, DIM, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    target = torch.randn(3, 21, DIM, generator=torch.Generator().manual_seed(2))
    y, expected = layer(ours).y, block(theirs)
    for result in (y, expected):
        (result * target).sum().backward()

    close(y, expected)
    close(ours.grad, theirs.grad)
    close(layer.router.weight.grad, block.gate.weight.grad)
    close(layer.experts.w_in.grad, block.experts.gate_up_proj.grad.transpose(1, 2))
    close(layer.experts.w_out.grad, block.experts.down_proj.grad.transpose(1, 2))


def close(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None
    assert expected is not None
    scale = float(expected.detach().abs().max())
    assert scale > 0.1
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * scale)
