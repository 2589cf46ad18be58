"""The experts of a transformers block, computed on rows grouped by expert.

transformers stacks the experts of a block: `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F], or
transposed, with or without biases, `up_proj` [E, F, D] where there is no gate. A transposed view of
a stack is dmoe's layout, without a copy: plain SwiGLU runs in `feed_forward`; any other unit is the
block's own `_apply_gate` between two grouped products.

Letters: R rows, D width, F hidden width, E experts, e local experts, K experts per token, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dmoe.moe.experts.copies import Weights, compute_experts
from dmoe.moe.experts.grouped_mlp import feed_forward
from dmoe.moe.experts.grouped_product import grouped_linear
from dmoe.moe.interfaces import RowCounts, TokensPerExpert
from dmoe.moe.placement import ExpertPlacement, contiguous_placement

SILU = ("SiLU", "SiLUActivation")
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
FACTOR_A, FACTOR_B = "lora_A", "lora_B"
"""Names of low-rank factors (`lora.py`); of a stack, followed by its name."""


class ExpertOwner(Protocol):
    """The block of the experts."""

    def compute_experts(
        self, experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor
    ) -> Tensor: ...


class MoefiedExperts:
    """Mixed into the class of a block's experts: dispatches to the experts of all ranks.

    No parameter is added, moved or renamed. `owner` is the block, in `__dict__`, so that it is no
    child.
    """

    takes_copies = True
    num_all_experts: int
    """E, over all ranks."""
    first_expert: int
    """Global id of the first local expert."""
    has_peft_layout: bool = True
    """Whether peft reads the stacks' layout from the class; it takes others for [E, out, in]."""

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted sum of the chosen experts; the arguments are transformers' own."""
        index = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        assert index is not None, "the experts' call has no choice"
        assert weights is not None, "the experts' call has no weights"
        owner: ExpertOwner = self.__dict__["owner"][0]
        x_TD = hidden_states.flatten(0, -2)
        y_TD = owner.compute_experts(
            cast(nn.Module, self), x_TD, index.flatten(0, -2), weights.flatten(0, -2)
        )
        y_TD = y_TD.to(hidden_states.dtype)
        if hidden_states.ndim == 2:
            return y_TD
        # no view: FSDP2 loses the hook of its backward, if the caller adds to it in place
        return y_TD.view_as(hidden_states).clone()

    @property
    def multiply_adds(self) -> tuple[int, ...]:
        """Weights of each expert of all ranks, biases included."""
        own = stacked_parameters(cast(nn.Module, self)).values()
        return (sum(p.numel() // len(p) for p in own),) * self.num_all_experts

    @property
    def cost(self) -> tuple[float, ...]:
        """Cost of each expert as a share of that of all: they are equal."""
        return (1 / self.num_all_experts,) * self.num_all_experts

    def placement(self, ranks: int) -> ExpertPlacement:
        """Return equal, contiguous runs."""
        return contiguous_placement(self.num_all_experts, ranks)

    def slice_experts(self, placement: ExpertPlacement, rank: int) -> None:
        """Keep only the experts of one rank; nothing to do if only they were loaded."""
        module = cast(nn.Module, self)
        owned = placement.experts[rank]
        self.first_expert = owned[0]
        for name, whole in stacked_parameters(module).items():
            if len(whole) != self.num_all_experts:
                assert len(whole) == len(owned), f"{name} has {len(whole)} of the experts"
                continue
            kept = whole.detach()[owned[0] : owned[0] + len(owned)].clone()
            setattr(module, name, nn.Parameter(kept, requires_grad=whole.requires_grad))
        cast(Any, self).num_experts = len(owned)


def stacked_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the experts by name: each is a stack, one entry per expert."""
    return dict(experts.named_parameters(recurse=False))


def stacked_weights(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the experts by name, in the order of the module."""
    return {n: p for n, p in stacked_parameters(experts).items() if n in WEIGHTS and p.ndim == 3}


def _product(
    experts: nn.Module,
    name: str,
    weights: Weights,
    rows_RX: Tensor,
    tokens_per_expert: TokensPerExpert,
) -> Tensor:
    """Multiply rows with the weight `name` of their expert, and add its low-rank product."""
    out = grouped_linear(rows_RX, weights[name], tokens_per_expert)
    scale = experts.__dict__.get("lora_scale")
    if scale is None:
        return out
    a, b = (weights[f"{factor}_{name}"].transpose(1, 2) for factor in (FACTOR_A, FACTOR_B))
    low_rank = grouped_linear(rows_RX, a, tokens_per_expert)
    added: Tensor = scale * grouped_linear(low_rank, b, tokens_per_expert)
    return out + added


def expert_rows(experts: Any, rows_RD: Tensor, row_counts: RowCounts) -> Tensor:
    """Apply each local expert, and each copy of another rank's, to its rows, [R, D].

    Args:
        experts: a block's experts, of transformers' layout.
        rows_RD: rows grouped by expert, in the dtype to compute in.
        row_counts: rows of each local expert, and of the copies if there are any.
    """
    weights = {name: p.to(rows_RD.dtype) for name, p in stacked_parameters(experts).items()}

    def compute(weights: Weights, rows: Tensor, counts: TokensPerExpert) -> Tensor:
        return _expert_rows(experts, weights, rows, counts)

    return compute_experts(compute, weights, rows_RD, row_counts)


def _expert_rows(
    experts: Any, weights: Weights, rows_RD: Tensor, tokens_per_expert: TokensPerExpert
) -> Tensor:
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    if not experts.is_transposed:
        turned = {name: weights[name].transpose(1, 2) for name in (up, "down_proj")}
        weights = {**weights, **turned}
    w_in, w_out = weights[up], weights["down_proj"]
    if is_plain_swiglu(experts) and "lora_scale" not in experts.__dict__:
        return feed_forward("swiglu", rows_RD, w_in, w_out, tokens_per_expert)
    unit: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
    expert_R = _expert_of_rows(tokens_per_expert, w_in) if experts.has_bias else None
    hidden = _product(experts, up, weights, rows_RD, tokens_per_expert)
    if expert_R is not None:
        hidden = hidden + weights[f"{up}_bias"][expert_R]
    hidden = unit(hidden).to(rows_RD.dtype)
    out_RD = _product(experts, "down_proj", weights, hidden, tokens_per_expert)
    if expert_R is not None:
        out_RD = out_RD + weights["down_proj_bias"][expert_R]
    if getattr(experts, "has_post_expert_norm", False):
        out_RD = experts.post_expert_norm(out_RD)
    return out_RD


def is_plain_swiglu(experts: Any) -> bool:
    """Return whether an expert computes `down(silu(gate(x)) * up(x))` without biases or clamps."""
    if not experts.has_gate or experts.has_bias or not getattr(experts, "is_concatenated", True):
        return False
    own_unit = getattr(type(experts)._apply_gate, "__name__", "") != "_default_apply_gate"
    normed = getattr(experts, "has_post_expert_norm", False)
    return not own_unit and not normed and type(experts.act_fn).__name__ in SILU


def _expert_of_rows(tokens_per_expert: TokensPerExpert, w_in: Tensor) -> Tensor:
    """Return the local expert of each row, int64 [R]; of unused rows, the last one."""
    counts = 1 if isinstance(tokens_per_expert, int) else len(tokens_per_expert) - len(w_in) + 1
    local = torch.arange(len(w_in) + counts - 1, device=w_in.device).clamp(max=len(w_in) - 1)
    return local.repeat_interleave(tokens_per_expert)
