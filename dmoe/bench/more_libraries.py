"""The layer as DeepSpeed, torchtitan and st-moe-pytorch compute it, with a `dmoe.MoE`'s weights.

What would make them compute something else is set so that they do not: no capacity (or one that no
expert reaches), no noise, no sampling of the second expert, top-k weights divided by their sum.
What is left of their differences is in the docstrings, and compared before the clock starts.

Where a library leaves the expert to its user, it is `SwiGLU`: two products, gate and up in one.

Letters: T tokens, D width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.bench.contender import CannotCompare, Contender, from_module
from dmoe.bench.mixtral_block import mixtral_block
from dmoe.moe.layer import MoE

GROUP_BYTES = 2**28
"""Bytes of st-moe's largest tensor, [K, groups, T/groups, E, slots] in float32."""


class SwiGLU(nn.Module):
    """One expert: silu(x W_gate) * (x W_up) W_down."""

    def __init__(self, w_in: Tensor, w_out: Tensor) -> None:
        super().__init__()
        self.w_in = nn.Parameter(w_in.detach().clone())
        self.w_out = nn.Parameter(w_out.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return the expert's output of x [..., D]."""
        gate, up = (x @ self.w_in).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.w_out


def deepspeed(
    layer: MoE, x: Tensor, grad: Tensor, group: Any = None, ranks: int = 1, rank: int = 0
) -> Contender:
    """Build `deepspeed.moe.layer.MoE` with `drop_tokens=False`.

    Every expert gets as many slots as the fullest one of all ranks has rows, so it computes rows of
    zeros. Its router is float32, and it computes a balance loss.
    """
    experts: Any = layer.experts
    with _no_stdout():
        module: Any = (
            import_module("deepspeed.moe.layer")
            .MoE(
                layer.dim,
                SwiGLU(experts.w_in[0], experts.w_out[0]),
                num_experts=len(experts.w_in) * ranks,
                ep_size=ranks,
                k=layer.top_k,
                drop_tokens=False,
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
            .to(x.device, x.dtype)
        )
        if group is not None:
            _start_deepspeed()
            module.deepspeed_moe._set_ep_group(group)
    gate = module.deepspeed_moe.gate.wg
    gate.weight = nn.Parameter(layer.router.get_parameter("weight").detach().clone())
    copies = module.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        for copy, w_in, w_out in zip(copies, experts.w_in, experts.w_out, strict=True):
            copy.w_in.copy_(w_in)
            copy.w_out.copy_(w_out)
    return from_module(
        module,
        lambda x: module(x)[0],
        x,
        grad,
        lambda: {"router": gate.weight.grad, **_stacked(copies)},
    )


def deepspeed_autoep(
    layer: MoE, x: Tensor, grad: Tensor, group: Any = None, ranks: int = 1, rank: int = 0
) -> Contender:
    """Build DeepSpeed's replacement of Mixtral's block, `AutoEPMoELayer`.

    On a CPU its experts are a loop: its grouped products have a Triton kernel between them. An
    expert's rows are padded to a multiple of 8. Its logits have the model's dtype, its scores are
    float32.
    """
    with _no_stdout():
        layers = import_module("deepspeed.module_inject.auto_ep_layer")
        configs = import_module("deepspeed.module_inject.auto_ep_config")
        block = mixtral_block(layer, x)
        for name in ("gate_up_proj", "down_proj"):  # it takes this rank's part of all
            own = getattr(block.experts, name).detach()
            setattr(block.experts, name, nn.Parameter(own.repeat(ranks, 1, 1)))
        spec = configs.MoELayerSpec(
            **dict.fromkeys(("moe_module_name", "shared_experts_name"), ""),
            **dict.fromkeys(("gate_bias", "return_router_logits", "has_shared_experts"), False),
            **dict.fromkeys(("router_logits_capture_index", "expert_w3_name")),
            router_logits_capture_layer_name=None,
            router_logits_capture_target="none",
            model_family="mixtral",
            router_name="gate",
            experts_name="experts",
            expert_storage="fused_3d",
            expert_w1_name="gate_up_proj",
            expert_w2_name="down_proj",
            num_experts=len(block.experts.down_proj),
            top_k=layer.top_k,
            hidden_size=layer.dim,
            ffn_hidden_size=block.experts.down_proj.shape[2],
            score_func="softmax",
            score_apply="post",
            route_norm=True,
        )
        config = configs.AutoEPConfig(use_grouped_mm=x.is_cuda, load_balance_coeff=None)
        module: Any = layers.AutoEPMoELayer(spec, block, ranks, rank, config)
        if group is not None:
            _start_deepspeed()
            module.ep_group = group
    experts = module.experts
    return from_module(
        module,
        module,
        x,
        grad,
        lambda: {
            "router": module.router.gate.weight.grad,
            "in": torch.cat([experts.w1.grad, experts.w3.grad], 1),
            "out": experts.w2.grad,
        },
    )


def torchtitan(layer: MoE, x: Tensor, grad: Tensor) -> Contender:
    """Build torchtitan's `MoE` with `torch._grouped_mm`, without its load balance.

    Its experts compute in bf16 whatever the model's dtype: it is left out in float32. It asks for
    logits and scores in float32 by autocast, which a CPU does not have: there they are bf16.
    """
    moe = import_module("torchtitan.models.common.moe")
    linear = import_module("torchtitan.models.common.linear")
    dispatcher = import_module("torchtitan.models.common.token_dispatcher")
    if x.dtype != torch.bfloat16:
        raise CannotCompare("computes its experts in bf16 whatever the model's dtype")
    weights: Any = layer.experts
    n_experts, hidden, _ = weights.w_out.shape
    sizes = {"num_experts": n_experts, "top_k": layer.top_k}
    config = moe.MoE.Config(
        num_experts=n_experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(
                dim=layer.dim, hidden_dim=hidden, num_experts=n_experts
            ),
            token_dispatcher=dispatcher.LocalTokenDispatcher.Config(**sizes),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            gate=linear.Linear.Config(in_features=layer.dim, out_features=n_experts),
            score_func="softmax",
            route_norm=True,
            **sizes,
        ),
        load_balance_coeff=None,
    )
    module: Any = config.build().to(x.device, x.dtype)
    experts, gate = module.routed_experts.inner_experts, module.router.gate
    with torch.no_grad():
        gate.weight.copy_(layer.router.get_parameter("weight"))
        for own, part in zip(
            (experts.w1_EFD, experts.w3_EFD), weights.w_in.chunk(2, dim=2), strict=True
        ):
            own.copy_(part.transpose(1, 2))
        experts.w2_EDF.copy_(weights.w_out.transpose(1, 2))
    warnings.filterwarnings("ignore", "In CPU autocast")
    return from_module(
        module,
        module,
        x,
        grad,
        lambda: {
            "router": gate.weight.grad,
            "in": torch.cat([experts.w1_EFD.grad, experts.w3_EFD.grad], 1),
            "out": experts.w2_EDF.grad,
        },
    )


def st_moe(layer: MoE, x: Tensor, grad: Tensor) -> Contender:
    """Build st-moe-pytorch's `MoE` with as many slots as the fullest expert has rows.

    It dispatches by products with a tensor of tokens, experts and slots, so the tokens are in
    groups, each with slots of its own, as few as keep that tensor at 256 MiB. No token is
    dropped by chance (threshold 0), and the dispatch tensor passes no gradient. It computes a
    balance loss and a z-loss. Its combine tensor is float32: it is left out in bf16.
    """
    moe = import_module("st_moe_pytorch")
    if x.dtype != torch.float32:
        raise CannotCompare("multiplies by a float32 combine tensor: no bf16")
    experts: Any = layer.experts
    n_experts = len(experts.w_in)
    expert_TK = layer(x).plan.expert_TK
    group, slots = _group_size(expert_TK, n_experts)
    module: Any = moe.MoE(
        layer.dim,
        n_experts,
        gating_top_n=layer.top_k,
        threshold_train=0.0,
        capacity_factor_train=(slots + 0.5) * n_experts / group,
        straight_through_dispatch_tensor=False,
        is_distributed=False,
        experts=nn.ModuleList(map(SwiGLU, experts.w_in, experts.w_out)),
    ).to(x.device)
    gate = module.gate.to_gates
    gate.weight = nn.Parameter(layer.router.get_parameter("weight").detach().clone())
    return from_module(
        module,
        lambda x: module(x.view(-1, group, layer.dim)).outputs.view_as(x),
        x,
        grad,
        lambda: {"router": gate.weight.grad, **_stacked(module.experts.experts)},
    )


def _group_size(expert_TK: Tensor, n_experts: int) -> tuple[int, int]:
    """Return the tokens of a group, the most that fit, and the rows of its fullest expert."""
    tokens, top_k = expert_TK.shape
    group = tokens
    while True:
        groups = expert_TK.reshape(-1, group * top_k)
        counts = [torch.bincount(chosen, minlength=n_experts) for chosen in groups]
        # 4: the least slots that the library gives
        slots = max(4, int(torch.stack(counts).max()))
        if 4 * top_k * tokens * n_experts * slots <= GROUP_BYTES or group % 2:
            return group, slots
        group //= 2


def _stacked(experts: Any) -> dict[str, Tensor]:
    return {
        "in": torch.stack([expert.w_in.grad.t() for expert in experts]),
        "out": torch.stack([expert.w_out.grad.t() for expert in experts]),
    }


def _no_stdout() -> contextlib.AbstractContextManager[Any]:
    """Send what DeepSpeed prints while it starts to stderr: stdout is the report's."""
    return contextlib.redirect_stdout(sys.stderr)


def _start_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists; the first time it compiles an operator."""
    import_module("deepspeed").init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
