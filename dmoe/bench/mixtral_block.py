"""The same layer as transformers computes it: Mixtral's block, with the weights of a `dmoe.MoE`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.bench.contender import Contender, from_module
from dmoe.moe.layer import MoE


def transformers(layer: MoE, x: Tensor, grad: Tensor) -> Contender:
    """Build Mixtral's block with `experts_implementation="grouped_mm"`.

    Its logits have the model's dtype: in bf16 a few tokens select another expert.
    """
    block = mixtral_block(layer, x)
    return from_module(
        block,
        block,
        x,
        grad,
        lambda: {
            "router": block.gate.weight.grad,
            "in": block.experts.gate_up_proj.grad,
            "out": block.experts.down_proj.grad,
        },
    )


def mixtral_block(layer: MoE, x: Tensor) -> Any:
    """Return Mixtral's block with the layer's experts, of this rank alone if they are sharded."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts: Any = layer.experts
    options: Any = {"experts_implementation": "grouped_mm"}
    config = MixtralConfig(
        hidden_size=layer.dim,
        intermediate_size=experts.w_out.shape[1],
        num_local_experts=len(experts.w_out),
        num_experts_per_tok=layer.top_k,
        router_jitter_noise=0.0,
        **options,
    )
    assert config._experts_implementation == "grouped_mm", "another implementation would run"
    block: Any = MixtralSparseMoeBlock(config)  # type: ignore[no-untyped-call]
    block.gate.weight = nn.Parameter(layer.router.get_parameter("weight").detach().clone())
    block.to(x.device, x.dtype)
    with torch.no_grad():
        block.experts.gate_up_proj.copy_(experts.w_in.transpose(1, 2))
        block.experts.down_proj.copy_(experts.w_out.transpose(1, 2))
    return block


def transformers_all_to_all(
    layer: MoE, x: Tensor, grad: Tensor, group: Any, ranks: int, rank: int
) -> Contender:
    """Build the same block with transformers' all-to-all expert parallelism over `group`."""
    from transformers.distributed.expert_parallel import AllToAllEP

    block = mixtral_block(layer, x)
    # in place of two device meshes: all that the class asks of them
    over, alone = (SimpleNamespace(get_group=lambda: group, size=lambda n=n: n) for n in (ranks, 1))
    implementation: Any = AllToAllEP
    block.experts._is_expert_parallel = True
    block.experts.forward = implementation(block.experts, over, alone)
    return from_module(block, block, x, grad, dict)
