"""Routing by label and by token id: arithmetic, without parameters or gradients."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.schema import RouterConfig
from dmoe.moe.routers import build_router
from dmoe.moe.routers.static import hash_experts
from dmoe.moe.routing import TokenContext
from dmoe.verify.naive.static import hash_experts as hash_reference
from tests.moe.strategies import drawn
from tests.references.routers import fixed_reference


@drawn
@given(
    kind=st.sampled_from(["fixed", "hash"]),
    num_experts=st.sampled_from([1, 2, 3, 7, 12]),
    numbers=st.lists(st.integers(0, 200_000), max_size=9),
    layer=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_equals_the_definition(
    kind: str,
    num_experts: int,
    numbers: list[int],
    layer: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, min(4, num_experts)))
    router = build_router(RouterConfig(kind=kind, scale=3.0), 5, num_experts, top_k, layer)  # type: ignore[arg-type]
    number_T = torch.tensor(numbers, dtype=torch.int64)
    valid_T = data.draw(st.sampled_from([None, number_T % 2 == 0]))
    routing = router(
        torch.ones(len(numbers), 5, dtype=dtype),
        TokenContext(valid_T, label_T=number_T, token_id_T=number_T),
    )
    expected = [
        fixed_reference(n, top_k, num_experts)
        if kind == "fixed"
        else hash_reference(n, top_k, num_experts, layer)
        for n in numbers
    ]
    assert routing.expert_TK.tolist() == expected
    assert all(len(set(row)) == top_k and max(row) < num_experts for row in expected)
    assert (
        routing.weight_TK.dtype
        == routing.score_TE.dtype
        == torch.promote_types(dtype, torch.float32)
    )
    torch.testing.assert_close(routing.weight_TK, torch.full_like(routing.weight_TK, 3.0 / top_k))
    score_TE = torch.zeros_like(routing.score_TE)
    for t, row in enumerate(expected):
        score_TE[t, row] = 1 / top_k
    assert torch.equal(routing.score_TE, score_TE)
    assert routing.logit_TE.logsumexp(1).tolist() == pytest.approx([0.0] * len(numbers), abs=1e-6)
    assert (routing.selected_TK is None) == (valid_T is None)
    if valid_T is not None:
        assert torch.equal(routing.selected_TK, valid_T.unsqueeze(1).expand(-1, top_k))
    assert not list(router.parameters())


def test_enough_labels_share_nothing() -> None:
    router = build_router(RouterConfig(kind="fixed"), 4, 6, 2, 0)
    routing = router(torch.ones(3, 4), TokenContext(label_T=torch.arange(3)))
    assert routing.expert_TK.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_hashes_spread_evenly_over_ordered_pairs() -> None:
    """Chi-square over the 5 * 4 ordered pairs of distinct experts."""
    rows = hash_experts(torch.arange(20_000), 2, 5, 0).tolist()
    seen = Counter(map(tuple, rows))
    assert set(seen) == set(permutations(range(5), 2))
    assert sum((count - 1000) ** 2 / 1000 for count in seen.values()) < 19 + 5 * (2 * 19) ** 0.5


def test_layers_hash_apart() -> None:
    token_T = torch.arange(7000)
    same = (hash_experts(token_T, 1, 7, 0) == hash_experts(token_T, 1, 7, 1)).double().mean()
    assert 0.11 < float(same) < 0.18


def test_the_hash_never_changes() -> None:
    """A checkpoint is worth nothing if its tokens find other experts: these numbers are forever."""
    assert hash_experts(torch.tensor([0, 1, 255, 50_000]), 2, 8, 0).tolist() == KNOWN_0
    assert hash_experts(torch.tensor([0, 1, 255, 50_000]), 2, 8, 3).tolist() == KNOWN_3


KNOWN_0 = [[0, 6], [5, 4], [6, 4], [5, 4]]
KNOWN_3 = [[3, 5], [0, 1], [4, 1], [4, 6]]


@pytest.mark.parametrize(("kind", "field"), [("fixed", "label_T"), ("hash", "token_id_T")])
def test_what_is_missing_is_said(kind: str, field: str) -> None:
    router = build_router(RouterConfig(kind=kind), 4, 6, 2, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"router.kind={kind} needs .* TokenContext\({field}="):
        router(torch.ones(3, 4), TokenContext())
    with pytest.raises(ValueError, match=rf"{field}=int64\[2\]: must be \[3\]"):
        router(torch.ones(3, 4), TokenContext(**{field: torch.zeros(2, dtype=torch.int64)}))
