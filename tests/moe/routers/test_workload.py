"""Forced routing: the workloads by their definition, their loads to the row, and no dependence on
the split of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.router_kinds import WORKLOADS
from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import build_router
from dmoe.moe.routing import BatchShape, Routing, TokenContext
from dmoe.verify.naive.static import workload_experts
from tests.moe.strategies import drawn

B, S, E, K, R = 8, 32, 16, 2, 4


def route(
    config: RouterConfig, first: int = 0, sequences: int = B, step: int = 3, seed: int = 1
) -> Routing:
    router = build_router(config, 4, E, K, 2)
    context = TokenContext(noise_key=(seed, step), first_sequence=first)
    return router(torch.zeros(sequences * S, 4), context, BatchShape(sequences))


def load_E(config: RouterConfig, **where: int) -> list[int]:
    routing = route(config, **where)
    made = routing.expert_TK[routing.is_selected_TK]
    return torch.bincount(made, minlength=E).tolist()


@drawn
@given(
    kind=st.sampled_from(sorted(WORKLOADS)),
    ranks=st.sampled_from([2, 3, 4]),
    per_rank=st.integers(1, 4),
    top_k=st.integers(1, 4),
    heat=st.sampled_from([1.0, 1.3, 1.6, 8 / 3]),
    layer=st.integers(0, 2),
    first=st.integers(0, 5),
    length=st.integers(1, 5),
    seed=st.integers(0, 3),
    step=st.integers(0, 9),
    valid=st.booleans(),
)
def test_equals_the_definition(
    kind: str, ranks: int, per_rank: int, top_k: int, heat: float, layer: int, first: int,
    length: int, seed: int, step: int, valid: bool,
) -> None:  # fmt: skip
    config, experts = RouterConfig(kind="workload", workload=kind, ranks=ranks), ranks * per_rank  # type: ignore[arg-type]
    if kind not in ("W0", "W4", "W5"):
        config = RouterConfig(kind="workload", workload=kind, ranks=ranks, hot=heat)  # type: ignore[arg-type]
    try:
        router = build_router(config, 4, experts, min(top_k, experts), layer)
    except ConfigError:
        return
    top_k = router.top_k
    valid_T = torch.arange(2 * length) % 2 == 0 if valid else None
    context = TokenContext(valid_T, noise_key=(seed, step), first_sequence=first)
    routing = router(torch.zeros(2 * length, 4), context, BatchShape(2))
    for t in range(2 * length):
        expected = workload_experts(
            config, experts, top_k, layer,
            token=first * length + t, length=length, seed=seed, step=step,
        )  # fmt: skip
        made = routing.expert_TK[t][routing.is_selected_TK[t]].tolist()
        assert made == (expected if valid_T is None or valid_T[t] else [])
        assert len(set(expected)) == len(expected) in (0, top_k)
        if not expected:
            assert routing.score_TE[t].tolist() == pytest.approx([1 / experts] * experts)


def test_each_workload_has_its_load() -> None:
    """512 assignments of 16 experts: 32 each is even; hot 1.6 is 51.2 and 25.6 in the mean."""
    even, near = [32] * E, (25, 26, 51, 52)
    assert load_E(RouterConfig(kind="workload")) == even
    for kind in ("W1", "W2", "W3", "W6"):
        load = load_E(RouterConfig(kind="workload", workload=kind, ranks=R))  # type: ignore[arg-type]
        assert sum(load) == B * S * K
        assert all(n in near for n in load)
        hot = [e for e, n in enumerate(load) if n > 32]
        owners = {e // (E // R) for e in hot}
        assert len(hot) == E // R
        assert len(owners) == {"W2": 1, "W3": 4, "W6": 1}.get(kind, len(owners))
    empty = load_E(RouterConfig(kind="workload", workload="W5", ranks=R))
    assert sum(empty) == B * S * K
    assert empty.count(0) == E // R
    assert {n for n in empty if n} <= {42, 43}
    burst = RouterConfig(kind="workload", workload="W7", ranks=R)
    assert [load_E(burst, step=step) == even for step in range(10)] == (
        [True] * 3 + [False, True]
    ) * 2
    ragged = RouterConfig(kind="workload", workload="W4", ranks=R)
    sources = route(ragged).is_selected_TK.reshape(B, S * K).sum(1).tolist()
    assert sources == [16, 32, 48, 64] * 2
    assert set(load_E(ragged)) == {sum(sources) // E}


def test_w6_rotates_and_w2_stays() -> None:
    def hot_rank(kind: str, step: int) -> int:
        load = load_E(RouterConfig(kind="workload", workload=kind, ranks=R), step=step)  # type: ignore[arg-type]
        return load.index(max(load)) // (E // R)

    first = hot_rank("W6", 0)
    assert [hot_rank("W6", step) for step in range(12)] == [(first + s // 3) % R for s in range(12)]
    assert len({hot_rank("W2", step) for step in range(6)}) == 1


@pytest.mark.parametrize("kind", sorted(WORKLOADS))
def test_a_split_of_the_batch_changes_nothing(kind: str) -> None:
    config = RouterConfig(kind="workload", workload=kind, ranks=R)  # type: ignore[arg-type]
    whole = route(config)
    for sequences in (1, 2, 4):
        parts = [route(config, first, sequences) for first in range(0, B, sequences)]
        assert torch.equal(torch.cat([p.expert_TK for p in parts]), whole.expert_TK)
        assert torch.equal(torch.cat([p.is_selected_TK for p in parts]), whole.is_selected_TK)
    assert not torch.equal(route(config, seed=2).expert_TK, whole.expert_TK)
    assert not torch.equal(route(config, step=4).expert_TK, whole.expert_TK)


def test_training_needs_a_key() -> None:
    router = build_router(RouterConfig(kind="workload"), 4, E, K, 0)
    with pytest.raises(ConfigError, match="noise_key"):
        router(torch.zeros(2, 4), TokenContext(), BatchShape(1))
    assert router.eval()(torch.zeros(2, 4), TokenContext(), BatchShape(1)).expert_TK.shape == (2, K)
