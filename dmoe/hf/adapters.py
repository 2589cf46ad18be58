"""Blocks whose experts are not all called with (x, index, weights), or not all computed.

    Llama-4   transformers:  y = sum over all experts e of  expert_e(score[t, e] * x_t)
                             (a score is 0 where e is not chosen)
              here:          y = expert_e(score[t, e] * x_t)  for the chosen e, wherever it is
    LongCat   y = sum_k w_k f_k(x),  f_k = expert k if k < E, else the identity (Z of them)
    ZAYA      one class more than experts: a token that chooses it skips the layer (y = 0)

The last two are zero-cost experts of dmoe: computed where the token is, without capacity and
dispatch, and counted like all others. Published Llama-4 models choose one expert per token; more
are refused.

Letters: T tokens, D width, E experts, Z zero-cost ones, F hidden width, K experts per token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.hf.experts import MoefiedExperts
from dmoe.hf.layer import MoefiedLayer

EXPERT_ID = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
"""The expert's id in the name of a tensor of one expert."""


class SwigluExperts(MoefiedExperts):
    """Stacks of plain SwiGLU of a class without `use_experts_implementation`."""

    has_gate, has_bias, is_concatenated = True, False, True
    has_peft_layout = False

    def _default_apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    _apply_gate = _default_apply_gate


class Llama4Experts(SwigluExperts):
    """Stacks `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D]."""

    is_transposed = True


class LongcatExperts(SwigluExperts):
    """Stacks `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]."""

    is_transposed = False


class Llama4Layer(MoefiedLayer):
    """A block whose experts get `weight * x`, with weight 1 afterwards."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Route, compute the chosen experts, and add the shared one, as the block does."""
        x_TD = hidden_states.flatten(0, -2)
        score_TE, logit_TE = self.router(x_TD)
        with self.replayed():
            index_T1 = logit_TE.topk(self.top_k, dim=1).indices
        weight_T1 = score_TE.gather(1, index_T1)
        routed_TD = self.experts(x_TD * weight_T1, index_T1, weight_T1.new_ones(weight_T1.shape))
        return cast(Any, self).shared_expert(x_TD) + routed_TD, logit_TE

    def keep_logits(self, module: nn.Module, inputs: object, output: Any) -> None:
        """Keep the logits, the second output of this router."""
        self.__dict__["latest_logits"] = output[1]


class ZayaLayer(MoefiedLayer):
    """A block whose router gives its skip class as expert 0 with weight 0."""

    def choice(self, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the router's choice with the skip class as expert E."""
        return expert_TK.masked_fill(weight_TK == 0, self.num_experts - 1)


MIXINS: dict[str, tuple[Any, Any]] = {
    "Llama4TextMoe": (Llama4Layer, Llama4Experts),
    "LongcatFlashMoE": (MoefiedLayer, LongcatExperts),
    "ZayaSparseMoeBlock": (ZayaLayer, MoefiedExperts),
}
"""Classes to mix into a block and its experts, by the class of the block."""


def count_zero_cost(block: nn.Module) -> int:
    """Return the number Z of choices of a block's router that are no expert with weights."""
    if type(block).__name__ == "ZayaSparseMoeBlock":
        return 1
    return int(getattr(block.experts, "zero_expert_num", 0) or 0)


def trim_identities(model: nn.Module) -> None:
    """Drop the rows of `gate_up_proj` that transformers 5.23 gives LongCat's identities, unread.

    Published files have none, so transformers itself cannot load them; files of its own
    `save_pretrained` have them.
    """
    for module in model.modules():
        experts: Any = module
        if hasattr(experts, "zero_expert_num"):
            stack, count = experts.gate_up_proj, len(experts.down_proj)
            kept = nn.Parameter(stack.detach()[:count].clone(), stack.requires_grad)
            experts.gate_up_proj = kept if len(stack) > count else stack


def freeze_indexers(model: nn.Module) -> None:
    """Freeze what chooses the positions of sparse attention (DeepSeek-V3.2 and its like).

    No gradient reaches it, and DDP does not reduce a bucket that waits for one.
    """
    for module in model.modules():
        if type(module).__name__.endswith("Indexer"):
            module.requires_grad_(False)


def has_identities(model: nn.Module) -> bool:
    """Return whether a model has experts of LongCat."""
    return any(hasattr(module, "zero_expert_num") for module in model.modules())


def has_unread_rows(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether files hold weights of LongCat's identities.

    Args:
        model: trimmed.
        names: of the tensors in the files.
    """
    return any(is_unread(model, name) for name in names)


def is_unread(model: nn.Module, name: str) -> bool:
    """Return whether a tensor of a file is a weight of one of LongCat's identities."""
    found = EXPERT_ID.search(name)
    if found is None:
        return False
    try:
        experts: Any = model.get_submodule(name[: found.start() - 1])
    except AttributeError:  # files with other names
        return False
    count = getattr(experts, "num_routed_experts", None)
    return count is not None and int(found[0]) >= count


def trimmed_class(kind: Any) -> Any:
    """Return a subclass of a model's class without the rows of identities, to read files with."""

    def build(self: Any, config: object, *args: Any, **more: Any) -> None:
        kind.__init__(self, config, *args, **more)
        trim_identities(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def check_adapted(block: nn.Module, name: str) -> None:
    """Refuse more than one expert per token of Llama-4. Raises ConfigError."""
    top_k = getattr(block, "top_k", None)
    if type(block).__name__ == "Llama4TextMoe" and top_k != 1:
        why = f"sends a token to {top_k} experts, with inputs of their own"
        raise ConfigError("model", f"{name} ({type(block).__name__})", why, "use one per token")
