"""The device decides on a step: clipping within fused AdamW, and a skip without a host read."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmoe.config.load import load
from dmoe.config.schema import GuardConfig
from dmoe.distributed import gradients
from dmoe.distributed.gradients import clip_grads_, decide_step, folds_clip, step_as_decided
from dmoe.train.step import compute_gradients, training_batches, update
from dmoe.train.step_guard import StepGuard
from tests.cli.commands import SMALL
from tests.train.test_loop import build


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """Take one step, so that there are moments; then gradients for the next."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(torch.randn(5, 8)).square().sum().backward()
        if not optimizer.state:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [value for p in parameters for value in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in (*parameters, *tensors)]


@pytest.mark.parametrize("max_norm", [0.1, 1e9, None])
def test_fused_adamw_clips_as_a_pass_of_its_own_does(max_norm: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = trained(model)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    square = sum(float(grad.double().square().sum()) for grad in grads)
    other, by_hand = deepcopy((model, optimizer))
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    decision = decide_step(torch.tensor([square / 4, square * 3 / 4, 7.0]).double(), max_norm)
    step_as_decided(optimizer, decision)
    clip_grads_(other, math.sqrt(square), max_norm)
    by_hand.step()
    for got, expected in zip(state(optimizer), state(by_hand), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert optimizer.found_inf is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("sums", [[math.inf, 1.0, 1.0], [1.0, math.nan, 1.0], [1.0, 1.0, math.inf]])
def test_a_step_that_is_not_finite_changes_no_weight_no_moment_and_no_count(
    sums: list[float],
) -> None:
    model = nn.Linear(8, 4)
    optimizer = trained(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    before = state(optimizer)
    step_as_decided(optimizer, decide_step(torch.tensor(sums).double(), 1.0))
    assert all(torch.equal(*pair) for pair in zip(state(optimizer), before, strict=True))


def test_only_fused_adamw_of_float32_clips() -> None:
    model = nn.Linear(8, 4)
    adamw = torch.optim.AdamW
    assert folds_clip(adamw(model.parameters(), fused=True))
    assert not folds_clip(adamw(model.parameters(), fused=True), object())
    assert not folds_clip(adamw(model.parameters()))
    assert not folds_clip(adamw(nn.Linear(8, 4).double().parameters(), fused=True))
    assert not folds_clip(torch.optim.SGD(model.parameters()))


def test_a_guard_that_may_veto_a_finite_step_reads_its_loss_first() -> None:
    assert StepGuard(GuardConfig()).takes_finite_steps
    assert not StepGuard(GuardConfig(spike="skip")).takes_finite_steps
    guard = StepGuard(GuardConfig(nonfinite="skip", patience=2))
    guard.check(0, math.nan, 1.0)
    assert not guard.takes_finite_steps, "a spike would be the second bad step, which stops"


@pytest.mark.ranks
def test_a_step_taken_before_its_sums_are_read_has_the_same_bits() -> None:
    """The trainer takes it so; `verify` and one's own loop read first."""
    results = []
    for early in (False, True):
        engine = build(load(None, [*SMALL, "data.source=synthetic:zipf", "optim.clip=0.05"]))
        data = engine.task.open_data()
        for step in range(2):
            batches = training_batches(data.train, engine, step)
            totals = compute_gradients(engine, batches, take_at=0.01 if early else None)
            assert totals.taken == early
            result = update(engine, totals, 0.01)
            assert result.updated
            assert result.clip_factor < 1
        results.append([p.detach().clone() for p in engine.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.ranks
def test_a_step_that_is_read_first_is_decided_from_the_same_float64() -> None:
    """Its sums went through float32: scales in other bits, and above 3.4e38 a step that was said to
    be taken changed nothing."""
    engine = build(load(None, [*SMALL, "data.source=synthetic:zipf", "optim.clip=1.0"]))
    data = engine.task.open_data()
    totals = compute_gradients(engine, training_batches(data.train, engine, 0))
    before = [p.detach().clone() for p in engine.model.parameters()]
    assert update(engine, replace(totals, squared_grad_norm=1e40), 0.01).updated
    after = list(engine.model.parameters())
    assert not all(torch.equal(*pair) for pair in zip(after, before, strict=True))


def test_the_copy_to_the_host_waits_for_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    event = SimpleNamespace(
        record=lambda: calls.append("record"), synchronize=lambda: calls.append("wait")
    )
    real = torch.empty
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)

    def empty(*shape: Any, pin_memory: bool, **options: Any) -> Tensor:
        calls.append(f"pinned {pin_memory}")
        return real(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    read = gradients.start_host_copy(torch.tensor([1.0, 2.0]))
    assert calls == ["pinned True", "record"]
    assert read() == [1.0, 2.0]
    assert calls[-1] == "wait"
