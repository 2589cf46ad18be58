"""`dmoe verify` with copies for the step: green, and red for four bugs of them.

They have cases of their own: the bugs of `bugs.py` run without copies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import dmoe.verify.verify as verification
from dmoe.config.load import load
from dmoe.distributed.placement import copies as expert_copies
from dmoe.distributed.placement.copies import WeightExchange
from dmoe.moe.copy_planner import CopyPlan
from dmoe.verify.cases import CasePlan, plan_cases
from dmoe.verify.verify import verify
from tests.verify.test_verify import SHORT, lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SETTINGS = [*SHORT, "parallel.placement.copies=2"]


def gradient_lost() -> None:
    """Leave the gradients of the copies where they are."""
    WeightExchange.add_gradients = lambda *_: None  # type: ignore[method-assign]


def gradient_counted_twice() -> None:
    add = WeightExchange.add_gradients

    def twice(self: Any, own: list[Tensor], copied: list[Tensor]) -> None:
        add(self, own, copied)
        add(self, own, copied)

    WeightExchange.add_gradients = twice  # type: ignore[method-assign]


def stale_weights() -> None:
    """Compute copies with the weights of the first step."""
    send, first = WeightExchange.send, dict[Any, list[Tensor]]()

    def stale(self: Any, stacks: tuple[Tensor, ...]) -> list[Tensor]:
        sent = [stack.clone() for stack in stacks]
        return send(self, tuple(first.setdefault((self.expert_group.layer, len(sent)), sent)))

    WeightExchange.send = stale  # type: ignore[method-assign]


def split_differently() -> None:
    """Move one row less on rank 1 than on the others."""
    plan_copies = expert_copies.plan_copies

    def other(*args: Any) -> CopyPlan:
        plan = plan_copies(*args)
        if dist.get_rank() == 1 and plan.moves:
            move = plan.moves[0]
            return replace(plan, moves=(replace(move, rows=move.rows - 1), *plan.moves[1:]))
        return plan

    expert_copies.plan_copies = other


BUGS = {
    "gradient lost": (gradient_lost, "expert gradients"),
    "gradient counted twice": (gradient_counted_twice, "expert gradients"),
    "stale weights": (stale_weights, "layer outputs"),
    "split differently": (split_differently, "every rank finishes"),
}


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the one case that has copies and costs least."""

    def one_case(*arguments: Any) -> CasePlan:
        plan = plan_cases(*arguments)
        return replace(plan, cases=[case for case in plan.cases if case.ep == 2][:1])

    monkeypatch.setattr(verification, "plan_cases", one_case)
    patch, quantity = BUGS[name]
    report = verify(load(None, SETTINGS), worlds=[2], patch=patch)
    assert report.first is not None, "not found"
    assert report.first.quantity == quantity, lines(report)


def test_copies_change_nothing() -> None:
    """EP 2 and 4, ddp and fsdp, recomputed, with drops, and experts that move after every step."""
    settings = [*SETTINGS, "moe.capacity.factor=1.25", "parallel.placement.kind=periodic"]
    report = verify(load(None, settings), worlds=[4])
    assert report.ok, lines(report)
    assert {"4 ranks EP=2 packed fsdp", "4 ranks EP=4 packed ddp recompute"} <= {*report.cases}
    assert "saves nothing with moe.exchange=padded" in str(report.refused)
