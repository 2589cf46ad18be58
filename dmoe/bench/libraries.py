"""The same layer as other libraries compute it, with the weights of a `dmoe.MoE`.

Each is optional: `LIBRARIES` maps a name to a function that raises ImportError where the library is
not installed. None of them computes auxiliary losses or statistics, which `dmoe.MoE` does.

Letters: D width, F expert hidden width, E experts, H = 2F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.moe.layer import MoE


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer's forward and backward."""

    run: Callable[[], None]
    results: Callable[[], dict[str, Tensor]] = dict
    """Output and gradients by name, for the comparison of two contenders."""
    forward: Callable[[], object] | None = None


def clear(module: nn.Module, x: Tensor) -> None:
    """Forget all gradients."""
    module.zero_grad(set_to_none=True)
    x.grad = None


def transformers(layer: MoE, x: Tensor, grad: Tensor) -> Contender:
    """Build Mixtral's block with `experts_implementation="grouped_mm"`.

    Its logits have the model's dtype: in bf16 a few tokens select another expert.
    """
    block = mixtral_block(layer, x)
    x = x.detach().clone().requires_grad_()

    def run() -> None:
        clear(block, x)
        block(x).backward(grad)

    def results() -> dict[str, Tensor]:
        run()
        weights = {"in": block.experts.gate_up_proj.grad, "out": block.experts.down_proj.grad}
        return {"y": block(x), "x": x.grad, "router": block.gate.weight.grad, **weights}

    return Contender(run, results, lambda: block(x))


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
    layer: MoE, x: Tensor, grad: Tensor, group: Any, ranks: int
) -> Contender:
    """Build the same block with transformers' all-to-all expert parallelism over `group`."""
    from transformers.distributed.expert_parallel import AllToAllEP

    block = mixtral_block(layer, x)
    # in place of two device meshes: all that the class asks of them
    over, alone = (SimpleNamespace(get_group=lambda: group, size=lambda n=n: n) for n in (ranks, 1))
    implementation: Any = AllToAllEP
    block.experts._is_expert_parallel = True
    block.experts.forward = implementation(block.experts, over, alone)
    x = x.detach().clone().requires_grad_()

    def run() -> None:
        clear(block, x)
        block(x).backward(grad)

    def results() -> dict[str, Tensor]:
        run()
        return {"y": block(x), "x": x.grad}

    return Contender(run, results)


LIBRARIES: dict[str, Callable[[MoE, Tensor, Tensor], Contender]] = {"transformers": transformers}
"""Builders of the libraries, by name."""
