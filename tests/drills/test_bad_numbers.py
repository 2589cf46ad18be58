"""Fault 26: numbers that are no numbers, on one rank, in one expert, in one logit. All ranks leave the step out, to the bit.

The policies, and how a job ends that cannot be trained, are in test_bad_steps.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.distributed.gradients import local_tensor
from dmoe.train import engine as engines
from dmoe.train import step as steps
from dmoe.train.engine import Engine
from dmoe.train.step import training_batches
from dmoe.train.step_guard import StepAction, StepGuard
from tests.checkpoint.saving import patched
from tests.drills.worker import digest_of, run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.drills

BAD, LAST, RATE = 2, 4, 1e-2
"""The step whose numbers are spoilt, and the last one; the learning rate."""
Spoiler = Callable[[Engine], AbstractContextManager[None]]


@contextmanager
def nan_loss(engine: Engine) -> Iterator[None]:
    forward = steps.forward

    def spoilt(*args: Any) -> Any:
        output = forward(*args)
        output.loss_sum = output.loss_sum * math.nan
        return output

    with patched(steps, "forward", spoilt):
        yield


@contextmanager
def inf_in_one_expert(engine: Engine) -> Iterator[None]:
    """One number in the gradient of one expert, after all sums over ranks: nothing but the norm can tell the others."""
    finish, parameter = (
        engine.data_parallel.wait_for_grads,
        next(engine.model.moe_layers()[1].experts.parameters()),
    )

    def spoilt() -> None:
        finish()
        assert parameter.grad is not None
        local_tensor(parameter.grad).view(-1)[-1] = math.inf

    with patched(engine.data_parallel, "wait_for_grads", spoilt):
        yield


@contextmanager
def nan_logit(engine: Engine) -> Iterator[None]:
    """One logit of one token: the order of its experts, its weights and its losses have no meaning; the exchanges must still fit."""
    router = engine.model.moe_layers()[0].router
    logits = router.logits

    def spoilt(x_TD: torch.Tensor, context: Any) -> torch.Tensor:
        logit_TE = logits(x_TD, context).clone()
        logit_TE[3, 5] = math.nan
        return logit_TE

    with patched(router, "logits", spoilt):
        yield


def train_through(
    rank: int, world: int, config: Config, spoil: Spoiler | None
) -> list[tuple[str, str, str]]:
    """Of each step: what was decided, the digest of the whole state after it, the loss. Rank 1 alone spoils step `BAD`.

    Without a spoiler step `BAD` is left out all the same: that is what a run which has skipped it must be equal to.
    """
    here, data = worlds.init_distributed("cpu"), open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    guard, seen = StepGuard(config.guard), []
    for step in range(LAST + 1):
        bad = step == BAD
        with spoil(engine) if spoil is not None and bad and rank == 1 else nullcontext():
            totals = steps.compute_gradients(engine, training_batches(data.train, engine, step))
        kind, action = guard.check(step, totals.loss_sum, steps.grad_norm(totals))
        before = digest_of(engine)
        result = steps.update(
            engine, totals, RATE, apply=action is StepAction.APPLY and not (bad and spoil is None)
        )
        assert result.updated is (not bad)
        assert (digest_of(engine) == before) is bad, (
            f"step {step}: {action.value}, and the state says otherwise"
        )
        seen.append((f"{kind.value}, {action.value}", digest_of(engine), totals.loss_sum.hex()))
    return seen


def settings(mode: str) -> Config:
    return tiny("moe.capacity.factor=1.25", "moe.balance.bias=0.01", f"parallel.mode={mode}")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def left_out(request: pytest.FixtureRequest) -> tuple[str, list[tuple[str, str, str]]]:
    """A mode, and the run in which nothing is bad and step `BAD` is not done."""
    return request.param, run_ranks(2, train_through, settings(request.param), None)[0]


@pytest.mark.parametrize("spoil", [nan_loss, inf_in_one_expert, nan_logit])
def test_one_bad_number_on_one_rank_costs_all_ranks_the_step_and_nothing_else(
    spoil: Spoiler, left_out: tuple[str, list[tuple[str, str, str]]]
) -> None:
    """Parameters, moments, step counts and biases are as before it, on every rank, and the steps after it are taken."""
    mode, expected = left_out
    here, there = run_ranks(2, train_through, settings(mode), spoil)
    assert here == there
    decided = [what for what, _, _ in here]
    assert decided == ["good, taken"] * BAD + ["not finite, skipped"] + ["good, taken"] * (
        LAST - BAD
    )
    assert [(state, loss) for _, state, loss in here[BAD + 1 :]] == [
        (state, loss) for _, state, loss in expected[BAD + 1 :]
    ]
    assert here[BAD][1] == expected[BAD][1]
