"""Group-limited routing against its definition and DeepSeek-V3's router in transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import build_router
from dmoe.moe.routing import BatchShape, TokenContext
from tests.moe.routers.cases import Case, cases, identity_router, pairs
from tests.moe.strategies import drawn
from tests.references.routers import eligible_reference, next_experts_reference


@drawn
@given(case=cases(experts=(2, 3, 6, 8, 12)), data=st.data())
def test_equals_the_definition(case: Case, data: st.DataObject) -> None:
    groups = data.draw(
        st.sampled_from([n for n in range(1, case.num_experts + 1) if case.num_experts % n == 0])
    )
    topk_groups = data.draw(st.integers(1, groups))
    assume(case.top_k <= topk_groups * case.num_experts // groups)
    config = RouterConfig(
        "group_limited",
        "sigmoid",
        renormalize=case.top_k > 1,
        groups=groups,
        topk_groups=topk_groups,
        scale=2.0,
    )
    routing, got = pairs(identity_router(config, case), case, BatchShape(capacity=2))
    # Sums of two float32 scores can tie where the float64 sums do not: use the router's scores.
    biased_TE = (routing.score_TE + case.bias_E).tolist()
    for t, logits in enumerate(case.logit_TE.tolist()):
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        assert routing.score_TE[t].tolist() == pytest.approx(scores, rel=1e-6)
        allowed = eligible_reference(biased_TE[t], groups, topk_groups)
        chosen = sorted(allowed, key=lambda e: (-biased_TE[t][e], e))[: case.top_k]
        assert routing.expert_TK[t].tolist() == chosen
        total = sum(scores[e] for e in chosen) if case.top_k > 1 else 1.0
        expected = {e: 2.0 * scores[e] / total for e in chosen} if case.valid[t] else {}
        assert got[t] == pytest.approx(expected, rel=1e-5)
        spares = min(case.top_k, case.num_experts - case.top_k)
        experts, weights = next_experts_reference(
            logits, scores, biased_TE[t], chosen, allowed, config, spares
        )
        assert routing.next_expert_TS[t].tolist() == experts
        assert routing.next_weight_TS[t].tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("experts", "groups", "topk_groups", "top_k"), [(16, 4, 2, 4), (16, 8, 4, 8), (12, 3, 1, 3)]
)
def test_equals_transformers_deepseek_v3(
    experts: int, groups: int, topk_groups: int, top_k: int, renormalize: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    peer_config = DeepseekV3Config(
        hidden_size=10, n_routed_experts=experts, num_experts_per_tok=top_k, n_group=groups, topk_group=topk_groups,
        norm_topk_prob=renormalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    peer_config.num_local_experts = experts
    peer = DeepseekV3TopkRouter(peer_config)
    config = RouterConfig(
        "group_limited",
        "sigmoid",
        renormalize=renormalize,
        scale=2.5,
        groups=groups,
        topk_groups=topk_groups,
    )
    ours = build_router(config, 10, experts, top_k, 0)
    weight_ED = torch.randn(experts, 10, generator=generator)
    bias_E = torch.randn(experts, generator=generator) * 0.3
    with torch.no_grad():
        peer.weight.copy_(weight_ED)
        peer.e_score_correction_bias.copy_(bias_E)
        ours.weight.copy_(weight_ED)  # type: ignore[operator, union-attr]
        ours.bias_E.copy_(bias_E)  # type: ignore[operator, union-attr]
    x_TD = torch.randn(64, 10, generator=generator)
    logit_TE, weight_TK, expert_TK = peer(x_TD)
    routing = ours(x_TD, TokenContext())
    torch.testing.assert_close(routing.logit_TE, logit_TE)
    # The peer returns its choices unsorted.
    order_TK, peer_order_TK = routing.expert_TK.argsort(1), expert_TK.argsort(1)
    assert torch.equal(routing.expert_TK.gather(1, order_TK), expert_TK.gather(1, peer_order_TK))
    torch.testing.assert_close(
        routing.weight_TK.gather(1, order_TK), weight_TK.gather(1, peer_order_TK)
    )


def test_ties_go_to_the_lower_group() -> None:
    case = Case(torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8), None, 3)
    routing, _ = pairs(
        identity_router(RouterConfig("group_limited", groups=4, topk_groups=2), case),
        case,
        BatchShape(capacity=1),
    )
    assert routing.expert_TK.tolist() == [[0, 1, 2]] * 2
    assert routing.next_expert_TS.tolist() == [[3, -1, -1]] * 2
    assert routing.next_weight_TS.tolist() == [[pytest.approx(1 / 3), 0.0, 0.0]] * 2
