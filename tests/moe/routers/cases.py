"""Routers with logits equal to their inputs: ties, a hot expert, padding, no tokens, bf16.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import RouterModule, build_router
from dmoe.moe.routing import ONE_SEQUENCE, BatchShape, TokenContext

EVERY_KIND = (
    "top_k",
    "noisy",
    "group_limited",
    "adaptive",
    "fixed",
    "hash",
    "soft",
    "expert_choice",
    "budget",
    "workload",
)


@dataclass(frozen=True)
class Case:
    logit_TE: Tensor
    """The input, in the model's dtype."""
    bias_E: Tensor
    """Multiples of 1/4, so that float32 adds them without rounding twice."""
    valid_T: Tensor | None
    top_k: int

    @property
    def num_experts(self) -> int:
        return self.logit_TE.shape[1]

    @property
    def valid(self) -> list[bool]:
        return (
            [True] * len(self.logit_TE) if self.valid_T is None else [bool(v) for v in self.valid_T]
        )


@st.composite
def cases(
    draw: st.DrawFn, experts: tuple[int, ...] = (1, 2, 3, 5, 7, 12), top_k: int | None = None
) -> Case:
    num_experts = draw(st.sampled_from(experts))
    tokens = draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = draw(
        st.sampled_from([1, 3, 64])
    )  # few levels: ties are the rule; 64: every step is exact in bf16
    logit_TE = torch.randint(0, levels, (tokens, num_experts), generator=generator) / 16 - 1.0
    if draw(st.booleans()):
        logit_TE[:, draw(st.integers(0, num_experts - 1))] = 4.0  # one hot expert
    bias_E = (
        torch.randint(-2, 3, (num_experts,), generator=generator)
        / 4
        * draw(st.sampled_from([0.0, 1.0]))
    )
    masked = draw(st.sampled_from([None, 0.3, 1.0]))
    valid_T = None if masked is None else torch.rand(tokens, generator=generator) >= masked
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.bfloat16]))
    return Case(
        logit_TE.to(dtype), bias_E, valid_T, top_k or draw(st.integers(1, min(4, num_experts)))
    )


def identity_router(config: RouterConfig, case: Case) -> Any:
    """The router of `config` with W = 1, so that logits are inputs."""
    router = build_router(config, case.num_experts, case.num_experts, case.top_k, 0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(case.num_experts))
        router.bias_E.copy_(case.bias_E)
    return router.to(case.logit_TE.dtype)


def pairs(
    router: RouterModule, case: Case, shape: BatchShape = ONE_SEQUENCE, **context: Any
) -> tuple[Any, list[dict[int, float]]]:
    """The routing of a case, and of each token the weight of every expert it goes to."""
    routing = router(case.logit_TE, TokenContext(valid_T=case.valid_T, **context), shape)
    rows = zip(
        routing.expert_TK.tolist(),
        routing.weight_TK.tolist(),
        routing.is_selected_TK.tolist(),
        strict=True,
    )
    return routing, [{e: w for e, w, made in zip(*row, strict=True) if made} for row in rows]


def options_of(kind: str, num_experts: int = 6, top_k: int = 2) -> tuple[RouterConfig, int]:
    """Settings under which this kind is allowed, and its top_k."""
    config = {
        "group_limited": RouterConfig(
            kind="group_limited", groups=3, topk_groups=2, score="sigmoid"
        ),
        "adaptive": RouterConfig(kind="adaptive", renormalize=False),
        "budget": RouterConfig(kind="budget", renormalize=False),
        "expert_choice": RouterConfig(kind="expert_choice", allow_future_leak=True),
    }.get(kind, RouterConfig(kind=kind))  # type: ignore[arg-type]
    return config, num_experts if kind == "soft" else top_k


def known(tokens: int, **more: Any) -> TokenContext:
    """A context with everything any router asks for."""
    position_T = torch.arange(tokens)
    return TokenContext(
        token_id_T=position_T % 251,
        label_T=position_T % 3,
        noise_key=(5, 9),
        **more,
    )
