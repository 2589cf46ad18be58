"""Given choices in a published router: it weighs them by its own formula (`moe.replay.from`).

A router of transformers ends its choice with `torch.topk(x, K)` over the E experts, and computes
the weights from the result: by gathering scores, or from the values themselves. While the block
routes, that one call returns the given ids, and the values of `x` there. All else is the router's:
norm, score, scale, the gradient.

A router that restricts the choice to groups of experts sets the scores of the other groups to 0 in
`x`; ids of other groups then have the weights that its formula gives them there.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dmoe.config.errors import ConfigError


class _GivenTopk(TorchFunctionMode):
    """Replaces the result of the first `topk` of K out of E by the given ids."""

    def __init__(self, expert_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self.expert_TK, self.num_experts, self.used = expert_TK, num_experts, False

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.used or func not in (torch.topk, Tensor.topk):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        count = args[1] if len(args) > 1 else kwargs["k"]
        tokens, top_k = self.expert_TK.shape
        # scores of groups have a dimension more: [T, 1, E] where there is one group
        is_choice = x.numel() == tokens * self.num_experts and x.shape[-1] == self.num_experts
        if count != top_k or not is_choice or (x.ndim == 3 and x.shape[1] == 1 < tokens):
            return func(*args, **kwargs)
        self.used = True
        index = self.expert_TK.view(*x.shape[:-1], top_k)
        return torch.return_types.topk((x.gather(-1, index), index))


@contextmanager
def given_choices(expert_TK: Tensor | None, num_experts: int, name: str) -> Iterator[None]:
    """Let the router that runs inside choose the given experts; without any, do nothing.

    Args:
        expert_TK: int64, or None.
        num_experts: E.
        name: of the router's class, for errors.

    Raises:
        ConfigError: the router does not choose by `topk`.
    """
    if expert_TK is None:
        yield
        return
    with _GivenTopk(expert_TK.clamp(min=0), num_experts) as mode:
        yield
    if not mode.used:
        why = f"needs a router that chooses by topk, and {name} does not"
        raise ConfigError("moe.replay.from", name, why, "leave it out")
