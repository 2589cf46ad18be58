"""Routing to modules: tables, constants, sequences and tasks against loops; growing routers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.modular.base_model import grow_router
from dmoe.modular.routing import ConstantRouter, TableRouter, constant, routed, table
from dmoe.modular.routing.learned import sequence_mean
from dmoe.moe.routing import BatchShape, Routing, TokenContext
from tests.modular.nets import D, drawn
from tests.references.modular import (
    constant_reference,
    sequence_mean_reference,
    table_reference,
)

ROWS = [[0], [3, 1], [2, 0], [1]]


def choices(routing: Routing, t: int) -> tuple[list[int], list[float]]:
    kept = [k for k, selected in enumerate(routing.is_selected_TK[t].tolist()) if selected]
    return [int(routing.expert_TK[t, k]) for k in kept], [
        float(routing.weight_TK[t, k]) for k in kept
    ]


def test_a_table_sends_each_label_to_its_row() -> None:
    labels = torch.tensor([2, 0, 1, 3, 1])
    valid = torch.tensor([True, True, True, True, False])
    routing = TableRouter(ROWS, 4, weight=0.5)(
        drawn(5, D), TokenContext(label_T=labels, valid_T=valid)
    )
    for t, label in enumerate(labels.tolist()[:4]):
        assert choices(routing, t) == table_reference(ROWS, label, 0.5)
    assert choices(routing, 4) == ([], [])
    torch.testing.assert_close(routing.score_TE.sum(1), torch.ones(5, dtype=torch.float64))


def test_constant_weights_may_be_any_numbers() -> None:
    weights = [0.3, -2.0, 0.0]
    routing = ConstantRouter(weights)(drawn(3, D), TokenContext())
    assert all(choices(routing, t) == constant_reference(weights) for t in range(3))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 6)),
    st.randoms(use_true_random=False),
)
def test_the_mean_of_a_sequence(
    sequences: int, each: int, first: int | None, random: object
) -> None:
    x = drawn(sequences * each, 3)
    valid = torch.tensor([random.random() < 0.6 for _ in range(len(x))])  # type: ignore[attr-defined]
    for known in (None, valid):
        got = sequence_mean(x, known, sequences, first)
        expected = torch.tensor(
            sequence_mean_reference(x, known, sequences, first), dtype=torch.float64
        )
        torch.testing.assert_close(got, expected)


def test_per_sequence_all_tokens_follow_their_mean() -> None:
    router = routed("top_k", 5, 2, per="sequence", score="sigmoid", renormalize=False)(
        D, 0
    ).double()
    router.initialize(1, 0, 1.0)
    x = drawn(12, D)
    routing = router(x, TokenContext(), BatchShape(3))
    means = torch.stack([x[b * 4 : b * 4 + 4].mean(0) for b in range(3)])
    inner = router.router(means, TokenContext(), BatchShape(3))
    for t in range(12):
        assert choices(routing, t) == choices(inner, t // 4)
    only = routed("top_k", 5, 2, per="sequence", first=1)(D, 0).double()
    only.initialize(1, 0, 1.0)
    moved = x.clone()
    moved[[1, 2, 3, 5, 6, 7, 9, 10, 11]] += 5.0
    assert torch.equal(
        only(x, TokenContext(), BatchShape(3)).weight_TK,
        only(moved, TokenContext(), BatchShape(3)).weight_TK,
    )


def test_per_task_the_decision_depends_on_the_label_only() -> None:
    router = routed("top_k", 5, 2, per="task", labels=3)(D, 0).double()
    router.initialize(1, 0, 1.0)
    label = TokenContext(label_T=torch.tensor([2, 0, 2, 1]))
    routing, other = router(drawn(4, D), label), router(drawn(4, D, seed=1), label)
    assert torch.equal(routing.expert_TK, other.expert_TK)
    assert choices(routing, 0) == choices(routing, 2)
    logits = router.router.weight[:, 2]
    torch.testing.assert_close(routing.logit_TE[0], logits)


def test_unnormalised_scores_do_not_sum_to_one() -> None:
    router = routed("top_k", 4, 3, score="sigmoid", renormalize=False)(D, 0).double()
    router.initialize(0, 0, 1.0)
    x = drawn(2, D)
    expected = (x @ router.weight.t()).sigmoid().sort(1, descending=True).values[:, :3]
    torch.testing.assert_close(router(x, TokenContext()).weight_TK, expected)


@pytest.mark.parametrize(
    "make",
    [
        routed("top_k", 4, 2),
        routed("soft", 4, 4),
        routed("adaptive", 4, 2, renormalize=False),
        routed("top_k", 4, 2, per="sequence"),
        routed("top_k", 4, 2, per="task", labels=3),
        routed("fixed", 4, 1),
        constant(0.1, 0.2, 0.3, 0.4),
        table(ROWS, 4),
    ],
)
def test_a_router_grows_and_keeps_its_old_logits(make: object) -> None:
    router = make(D, 0).double()  # type: ignore[operator]
    router.initialize(3, 0, 1.0)
    context, x = TokenContext(label_T=torch.tensor([0, 1, 2])), drawn(3, D)
    before = router(x, context)
    grow_router(router, 2, seed=0)
    after = router(x, context)
    assert router.num_experts == after.score_TE.shape[1] == 6
    if before.logit_TE.std() > 0:
        assert torch.equal(after.logit_TE[:, :4], before.logit_TE)
    else:
        assert [choices(after, t)[0][:1] for t in range(3)] == [
            choices(before, t)[0][:1] for t in range(3)
        ]


def test_a_new_label_gets_a_row() -> None:
    router = TableRouter(ROWS, 4)
    grow_router(router, 1, seed=0)
    label = router.add_row([4])
    assert choices(router(drawn(1, D), TokenContext(label_T=torch.tensor([label]))), 0) == (
        [4],
        [1.0],
    )


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda: TableRouter([[0, 0]], 2), "each at most once"),
        (lambda: TableRouter([[2]], 2), "0 to 1"),
        (lambda: TableRouter([], 2), "rows"),
        (lambda: TableRouter([[0]], 2).add_row([0, 1]), "at most 1"),
        (lambda: routed("top_k", 4, 2, per="word"), "token, sequence or task"),
        (lambda: routed("top_k", 4, 2, per="task"), "labels"),
        (lambda: routed("top_k", 4, 2, first=1), "per=sequence"),
        (lambda: routed("soft", 4, 2)(D, 0), "top_k"),
        (lambda: grow_router(routed("hash", 4, 2)(D, 0), 1, 0), "HashRouter"),
    ],
)
def test_invalid_settings_are_refused(act: object, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        act()  # type: ignore[operator]


def test_a_table_without_labels_says_so() -> None:
    with pytest.raises(ValueError, match="label_T"):
        TableRouter(ROWS, 4)(drawn(2, D), TokenContext())
