"""`dmoe verify` on every router, capacity and shipped config; slow.

Every router runs dropless and with a capacity factor, on two ranks and on four. Of the (EP, exchange, mode)
that `verify` would compare there, one half runs. A half (`in_half`) is an orthogonal array: any two
of EP, exchange and mode meet in all their values, and the other rows of the same router run the
other half. So every pair of router, factor, ranks, EP, exchange and mode is compared, which
`test_every_pair_is_compared` counts. A bug that needs three of them at once, in one router, would
not be found. Every other capacity runs a half on four ranks, where experts are both sharded and
replicated; EP 1, where every rank has all experts, is compared by the rows of the routers. The
shipped configs, whose routers and capacities are in the other rows too, run on two, but for the two
of `ON_FOUR`: shared experts after a dense block, and grouped-query attention.

All combinations, and a second factor, about six times as long: `DMOE_FULL_MATRIX=1 pytest -m slow
tests/verify/test_matrix.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest

import dmoe.verify.verify as verification
from dmoe.config.load import load
from dmoe.verify.cases import Case, CasePlan, plan_cases, prepare, shrink
from tests.verify.halves import half_of, in_half
from tests.verify.test_verify import lines

FULL = os.environ.get("DMOE_FULL_MATRIX") == "1"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
ROUTERS = {
    "softmax": [],
    "sigmoid": ["moe.router.score=sigmoid", "moe.router.scale=2.5", "moe.balance.bias=0.01"],
    "jitter": [
        "moe.router.jitter=0.1",
        "moe.router.weights_from=chosen",
        "moe.router.renormalize=false",
    ],
    "switch": ["moe.top_k=1", "moe.router.renormalize=false", "moe.experts.kind=relu"],
    "noisy": [
        "moe.router.kind=noisy",
        "moe.balance.importance=0.1",
        "moe.balance.load=0.1",
        "moe.router.jitter=0.05",
    ],
    "group_limited": [
        "moe.router.kind=group_limited",
        "moe.router.groups=4",
        "moe.router.topk_groups=2",
        "moe.router.score=sigmoid",
        "moe.balance.bias=0.01",
    ],
    "adaptive": [
        "moe.router.kind=adaptive",
        "moe.top_k=4",
        "moe.router.renormalize=false",
        "moe.balance.usage_std=0.1",
    ],
    "fixed": ["moe.router.kind=fixed"],
    "hash": ["moe.router.kind=hash"],
    "workload": ["moe.router.kind=workload", "moe.router.workload=W4", "moe.router.ranks=3"],
    "soft": ["moe.router.kind=soft", "moe.top_k=8"],
    "budget": [
        "moe.router.kind=budget",
        "moe.top_k=8",
        "moe.router.renormalize=false",
        "moe.router.budget=0.4",
    ],
    "expert_choice": ["moe.router.kind=expert_choice", "moe.router.allow_future_leak=true"],
}
CAPACITIES = {
    "sequence": ["moe.capacity.group=sequence", "moe.balance.switch_level=sequence"],
    "global": ["moe.capacity.group=global", "moe.balance.switch_level=global"],
    "score": ["moe.capacity.priority=score", "moe.capacity.renormalize=true"],
    "next_choice": ["moe.capacity.overflow=next_choice"],
    "global score next_choice": [
        "moe.capacity.group=global",
        "moe.capacity.priority=score",
        "moe.capacity.overflow=next_choice",
    ],
    "pools, next_choice": [
        "moe.capacity.pool=4",
        "moe.capacity.pool_floor=0.5",
        "moe.capacity.overflow=next_choice",
    ],
    "global pools over two ranks": [
        "moe.capacity.pool=4",
        "moe.capacity.group=global",
        "moe.capacity.priority=score",
    ],
    "shared experts, dense first": [
        "moe.experts.shared=2",
        "model.dense_first=1",
        "model.tie_embeddings=false",
    ],
}

ON_FOUR = ("deepseek_moe_16b", "multi_gpu")

FACTORS = ["null", "1.25", *(["1.0"] if FULL else [])]
"""1.0 runs the code of 1.25 with more drops."""
ROWS = [(router, factor) for router in ROUTERS for factor in FACTORS]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def row(router: str, factor: str) -> tuple[list[str], int, int]:
    """Return overrides, ranks and half.

    Every second router runs on four ranks with a capacity, the others without.
    """
    number, column = list(ROUTERS).index(router), FACTORS.index(factor)
    ranks = 4 if (number + column) % 2 == 0 else 2
    return [*ROUTERS[router], f"moe.capacity.factor={factor}"], ranks, (number // 2 + column) % 2


@pytest.fixture
def verify_half(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Verify one half of the cases of some worlds; all cases on request."""

    def check(
        overrides: list[str],
        worlds: list[int],
        half: int,
        path: Path | None = None,
        min_ep: int = 1,
    ) -> None:
        def half_of_the_plan(*arguments: object) -> CasePlan:
            plan = plan_cases(*arguments)  # type: ignore[arg-type]
            return plan if FULL else half_of(plan, half, min_ep)

        monkeypatch.setattr(verification, "plan_cases", half_of_the_plan)
        report = verification.verify(load(path, overrides), worlds=[1, 2, 4] if FULL else worlds)
        assert report.ok, lines(report)
        assert any(row.size > 0 for row in report.rows), "compared with itself?"

    return check


@pytest.mark.parametrize(("router", "factor"), ROWS)
def test_routers(router: str, factor: str, verify_half: Callable[..., None]) -> None:
    overrides, ranks, half = row(router, factor)
    verify_half(overrides, [1, ranks], half)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_capacities(capacity: str, verify_half: Callable[..., None]) -> None:
    verify_half(
        [*CAPACITIES[capacity], "moe.capacity.factor=1.0"],
        [4],
        list(CAPACITIES).index(capacity) % 2,
        min_ep=2,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path, verify_half: Callable[..., None]) -> None:
    ranks = 4 if path.stem in ON_FOUR else 2
    verify_half([], [ranks], len(path.stem) % 2, path)


def pairs(row: tuple[str, str], cases: list[Case]) -> Iterator[frozenset[tuple[str, object]]]:
    """Yield every pair of settings that occurs in these cases."""
    for case in cases:
        settings: dict[str, object] = {
            "router": row[0],
            "factor": row[1],
            "world": case.world,
            "ep": case.ep,
        }
        settings |= {"exchange": case.exchange, "mode": case.mode}
        yield from map(frozenset, combinations(settings.items(), 2))


def test_every_pair_is_compared() -> None:
    """Moving or removing a row must not lose a pair that no other row has."""
    compared, possible = set[frozenset[tuple[str, object]]](), set[frozenset[tuple[str, object]]]()
    for name in ROWS:
        overrides, ranks, half = row(*name)
        cases = plan_cases(prepare(shrink(load(None, overrides)), 4), [1, 2, 4], 4).cases
        possible |= set(pairs(name, cases))
        compared |= set(
            pairs(
                name, [case for case in cases if case.world in (1, ranks) and in_half(case, half)]
            )
        )
    assert compared == possible, [sorted(map(str, pair)) for pair in possible - compared]
    assert len(possible) > 150
