"""Tensors of a forward as arrays on the host.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmoe.moe.routing import DispatchPlan, Routing


def as_array(value: Tensor) -> NDArray[Any]:
    """Copy a tensor of any device to the host; bfloat16 as float32."""
    # numpy has no bfloat16
    value = value.float() if value.dtype == torch.bfloat16 else value
    array: NDArray[Any] = value.detach().cpu().numpy().copy()
    return array


def computed_experts(assigned: Routing | DispatchPlan) -> NDArray[np.bool_]:
    """Return the experts that compute each token of this rank [T, E]; of a routing, the selected.

    Reads the tensors on the host.
    """
    active_TK = assigned.is_selected_TK if isinstance(assigned, Routing) else assigned.is_kept_TK
    computed_TE = active_TK.new_zeros(len(active_TK), assigned.num_experts)
    # one choice at a time: a dropped one must not overwrite a kept one of the same expert
    for k in range(active_TK.shape[1]):
        computed_TE |= torch.zeros_like(computed_TE).scatter_(
            1, assigned.expert_TK[:, k : k + 1], active_TK[:, k : k + 1]
        )
    return as_array(computed_TE)
