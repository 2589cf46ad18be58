"""Llama-4: a router that scales the input of the experts, and experts that are called without ids.

    transformers:  y = sum over all experts e of  expert_e(score[t, e] * x_t)
                   (a score is 0 where e is not chosen)
    here:          y = expert_e(score[t, e] * x_t)  for the chosen e, on whichever rank it is

Published models choose one expert per token; more are refused.

Letters: T tokens, D width, E experts, K = 1 experts per token.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.hf.experts import MoefiedExperts
from dmoe.hf.layer import MoefiedLayer


class Llama4Experts(MoefiedExperts):
    """Stacks `gate_up_proj` [E, D, 2F] and `down_proj` [E, F, D] of plain SwiGLU."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, True, True
    has_peft_layout = False

    def _default_apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    _apply_gate = _default_apply_gate


class Llama4Layer(MoefiedLayer):
    """A block whose experts get `weight * x`, with weight 1 afterwards."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Route, compute the chosen experts, and add the shared one, as the block does."""
        x_TD = hidden_states.flatten(0, -2)
        score_TE, logit_TE = self.router(x_TD)
        index_T1 = logit_TE.topk(self.top_k, dim=1).indices
        weight_T1 = score_TE.gather(1, index_T1)
        routed_TD = self.experts(x_TD * weight_T1, index_T1, weight_T1.new_ones(weight_T1.shape))
        return cast(Any, self).shared_expert(x_TD) + routed_TD, logit_TE

    def keep_logits(self, module: nn.Module, inputs: object, output: Any) -> None:
        """Keep the logits, the second output of this router."""
        self.__dict__["latest_logits"] = output[1]


def check_llama4(block: nn.Module, name: str) -> None:
    """Refuse more than one expert per token. Raises ConfigError."""
    top_k = cast(int, block.top_k)
    if top_k != 1:
        why = f"sends a token to {top_k} experts, with inputs of their own"
        raise ConfigError("model", f"{name} ({type(block).__name__})", why, "use one per token")
