"""`dmoe verify` on every router, capacity and shipped config: slow, so `.ci/run` runs it after the README's line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmoe.config.load import load
from dmoe.verification.verify import verify
from tests.verification.test_verify import lines

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
ROUTERS = {
    "softmax": [],
    "sigmoid": ["moe.router.score=sigmoid", "moe.router.scale=2.5", "moe.balance.bias=0.01"],
    "jitter": ["moe.router.jitter=0.1", "moe.router.weights_from=chosen", "moe.router.renormalize=false"],
    "switch": ["moe.top_k=1", "moe.router.renormalize=false", "moe.experts.kind=relu"],
    "noisy": ["moe.router.kind=noisy", "moe.balance.importance=0.1", "moe.balance.load=0.1", "moe.router.jitter=0.05"],
    "group_limited": [
        "moe.router.kind=group_limited",
        "moe.router.groups=4",
        "moe.router.topk_groups=2",
        "moe.router.score=sigmoid",
        "moe.balance.bias=0.01",
    ],
    "adaptive": ["moe.router.kind=adaptive", "moe.top_k=4", "moe.router.renormalize=false", "moe.balance.usage_std=0.1"],
    "fixed": ["moe.router.kind=fixed"],
    "hash": ["moe.router.kind=hash"],
    "soft": ["moe.router.kind=soft", "moe.top_k=8"],
    "budget": ["moe.router.kind=budget", "moe.top_k=8", "moe.router.renormalize=false", "moe.router.budget=0.4"],
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
    "shared experts, dense first": ["moe.experts.shared=2", "model.dense_first=1", "model.tie_embeddings=false"],
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def green(overrides: list[str], path: Path | None = None) -> None:
    report = verify(load(path, overrides), worlds=[1, 4] if path is None else [1, 2, 4])
    assert report.ok, lines(report)


@pytest.mark.parametrize("factor", ["null", "1.0", "1.25"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routers(router: str, factor: str) -> None:
    green([*ROUTERS[router], f"moe.capacity.factor={factor}"])


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_capacities(capacity: str) -> None:
    green([*CAPACITIES[capacity], "moe.capacity.factor=1.0"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    green([], path)
