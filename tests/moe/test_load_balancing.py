"""The auxiliary losses against loops over tokens and experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dmoe.config.schema import BalanceConfig
from dmoe.moe.interfaces import NoComm
from dmoe.moe.load_balancing import (
    auxiliary_losses,
    coefficients,
)
from dmoe.moe.load_balancing.losses import switch_loss, z_loss
from dmoe.moe.routing import BatchShape, Routing, TokenContext
from tests.moe.layers import close
from tests.moe.strategies import drawn, random_routing

LEVELS = ["sequence", "micro_batch", "global"]
TOKENS, SEQUENCES, RANKS = 24, 6, 2


class TwoEqualRanks:
    """This rank and one that chose and holds the same: every sum doubles."""

    size, averages = 2, False

    def sum(self, value: Tensor) -> Tensor:
        return 2 * value.detach()


def losses(
    routing: Routing,
    level: str,
    valid_T: Tensor | None = None,
    prior: Tensor | None = None,
    comm: object = None,
) -> dict[str, Tensor]:
    return auxiliary_losses(
        routing,
        BalanceConfig(switch_level=level),  # type: ignore[arg-type]
        TokenContext(valid_T=valid_T, prior_count_LE=prior),
        BatchShape(SEQUENCES),
        comm or NoComm(),  # type: ignore[arg-type]
        layer=1,
        micro_batches=RANKS,
    )


def case(masked: float | None = None, top_k: int = 2) -> tuple[Routing, Tensor | None]:
    routing = random_routing(TOKENS, 5, top_k, seed=3, levels=1000, masked=masked)
    return routing, None if routing.selected_TK is None else routing.selected_TK[:, 0]


def looped_switch(
    routing: Routing, tokens: range, valid_T: Tensor | None, prior: list[int] | None = None
) -> float:
    experts = routing.score_TE.shape[1]
    real = [t for t in tokens if valid_T is None or bool(valid_T[t])]
    counts = [
        sum(int((routing.expert_TK[t] == e).sum()) for t in real) + (prior[e] if prior else 0)
        for e in range(experts)
    ]
    total = 0.0
    for e in range(experts):
        share = counts[e] / max(1, sum(counts))
        total += (
            share
            * sum(float(routing.score_TE[t, e] / routing.score_TE[t].sum()) for t in real)
            / max(1, len(real))
        )
    return experts * total


def looped_z(routing: Routing, tokens: range, valid_T: Tensor | None) -> float:
    real = [t for t in tokens if valid_T is None or bool(valid_T[t])]
    return sum(float(routing.logit_TE[t].exp().sum().log()) ** 2 for t in real) / max(1, len(real))


def units(level: str) -> list[range]:
    count = {"sequence": SEQUENCES, "micro_batch": RANKS, "global": 1}[level]
    return [range(u * TOKENS // count, (u + 1) * TOKENS // count) for u in range(count)]


@pytest.mark.parametrize("masked", [None, 0.4])
@pytest.mark.parametrize("level", LEVELS)
def test_losses_equal_the_loops(level: str, masked: float | None) -> None:
    routing, valid_T = case(masked)
    got = losses(routing, level, valid_T)
    expected = [looped_switch(routing, unit, valid_T) for unit in units(level)]
    assert float(got["switch"]) == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    expected = [looped_z(routing, unit, valid_T) for unit in units("micro_batch")]
    assert float(got["z"]) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_shares_of_equal_ranks_sum_to_the_loss(level: str) -> None:
    routing, valid_T = case(0.3)
    alone, share = (
        losses(routing, level, valid_T),
        losses(routing, level, valid_T, comm=TwoEqualRanks()),
    )
    close(alone, {name: 2 * value for name, value in share.items()}, 1e-12)


def test_global_counts_the_steps_before() -> None:
    routing, valid_T = case(0.3)
    prior = [[9, 9, 9, 9, 9], [5, 0, 40, 1, 2]]
    got = losses(routing, "global", valid_T, torch.tensor(prior))["switch"]
    assert float(got) == pytest.approx(
        looped_switch(routing, range(TOKENS), valid_T, prior[1]), rel=1e-12
    )
    assert abs(float(got) - looped_switch(routing, range(TOKENS), valid_T)) > 1e-3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_perfect_balance_is_one_for_any_k(level: str, top_k: int) -> None:
    expert_TK = (torch.arange(TOKENS).unsqueeze(1) + torch.arange(top_k)) % 4
    score_TE = torch.rand(
        TOKENS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )  # f uniform: any P will do
    routing = Routing(expert_TK, torch.ones(TOKENS, top_k), score_TE, score_TE.log())
    assert float(losses(routing, level)["switch"]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_collapse_costs_e(level: str) -> None:
    score_TE = torch.zeros(TOKENS, 4, dtype=torch.float64)
    score_TE[:, 2] = 1.0
    routing = Routing(torch.full((TOKENS, 1), 2), torch.ones(TOKENS, 1), score_TE, score_TE)
    assert float(losses(routing, level)["switch"]) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_scores_are_normalised(level: str) -> None:
    """P_e is normalized: otherwise lowering every sigmoid score would lower the loss."""
    routing, _ = case()
    scale_T1 = torch.rand(TOKENS, 1, dtype=torch.float64) + 0.5
    close(
        losses(routing, level)["switch"],
        losses(replace(routing, score_TE=routing.score_TE * scale_T1), level)["switch"],
        1e-12,
    )


@pytest.mark.parametrize("masked", [None, 0.4])
@pytest.mark.parametrize("level", LEVELS)
def test_gradient_flows_through_p_only(level: str, masked: float | None) -> None:
    """d/ds of sum_e f_e P_e with f fixed: E * (f_e - sum f s) / S if the scores sum to 1."""
    routing, valid_T = case(masked)
    score_TE = torch.softmax(routing.logit_TE, -1).requires_grad_()
    losses(replace(routing, score_TE=score_TE), level, valid_T)["switch"].backward()
    assert score_TE.grad is not None
    expected = torch.zeros_like(score_TE)
    for unit in units(level):
        real = [t for t in unit if valid_T is None or bool(valid_T[t])]
        counts = torch.stack([(routing.expert_TK[real] == e).sum() for e in range(5)]).double()
        f = counts / counts.sum().clamp(min=1)
        for t in real:
            expected[t] = 5 * (f - (f * score_TE[t].detach()).sum()) / len(real) / len(units(level))
    close(score_TE.grad, expected, 1e-12)


@pytest.mark.parametrize("valid", [None, 0.4])
def test_z_gradient(valid: float | None) -> None:
    routing, valid_T = case(valid)
    logit_TE = routing.logit_TE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logit: z_loss(logit, valid_T, RANKS), (logit_TE,))
    z_loss(logit_TE, valid_T, RANKS).sum().backward()
    assert valid_T is None or (logit_TE.grad is not None and not logit_TE.grad[~valid_T].any())


@drawn
@given(
    per_unit=st.integers(1, 7),
    count=st.integers(1, 4),
    masked=st.sampled_from([None, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_counts_equal_the_loop(per_unit: int, count: int, masked: float | None, seed: int) -> None:
    routing = random_routing(per_unit * count, 5, 3, seed, masked=masked)
    expected = [[0] * 5 for _ in range(count)]
    for t in range(per_unit * count):
        for k in range(3):
            if routing.selected_TK is None or bool(routing.selected_TK[t, k]):
                expected[t // per_unit][int(routing.expert_TK[t, k])] += 1
    assert routing.choice_count(count).tolist() == expected


def test_a_unit_of_padding_costs_nothing() -> None:
    routing, _ = case()
    valid_T = torch.arange(TOKENS) >= TOKENS // SEQUENCES
    keep_TK = valid_T.unsqueeze(1).expand_as(routing.expert_TK)
    switch_U = switch_loss(replace(routing, selected_TK=keep_TK), valid_T, SEQUENCES)
    assert float(switch_U[0]) == 0.0
    assert bool((switch_U[1:] > 0).all())


def test_coefficients_name_the_losses_in_force() -> None:
    assert coefficients(BalanceConfig(switch=0.5, z=0.0)) == {"switch": 0.5}
    assert coefficients(BalanceConfig(switch=0.0, z=0.25)) == {"z": 0.25}
