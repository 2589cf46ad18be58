"""Fault 26: NaN and infinity on one rank, in one expert, in one logit: all ranks skip the step.

The policies and the end of a job that cannot be trained are in test_bad_steps.py.
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
from tests.checkpoint.helpers import patched
from tests.drills.worker import digest_of, run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.drills

BAD, LAST, RATE = 2, 4, 1e-2
"""Step with bad numbers, last step, learning rate."""
Corruption = Callable[[Engine], AbstractContextManager[None]]


@contextmanager
def nan_loss(engine: Engine) -> Iterator[None]:
    forward = steps.forward

    def corrupted(*args: Any) -> Any:
        output = forward(*args)
        output.loss_sum = output.loss_sum * math.nan
        return output

    with patched(steps, "forward", corrupted):
        yield


@contextmanager
def inf_in_one_expert(engine: Engine) -> Iterator[None]:
    """Set one number of an expert's gradient after all sums: other ranks see only the norm."""
    finish, parameter = (
        engine.data_parallel.wait_for_grads,
        next(engine.model.moe_layers()[1].experts.parameters()),
    )

    def corrupted() -> None:
        finish()
        assert parameter.grad is not None
        local_tensor(parameter.grad).view(-1)[-1] = math.inf

    with patched(engine.data_parallel, "wait_for_grads", corrupted):
        yield


@contextmanager
def nan_logit(engine: Engine) -> Iterator[None]:
    """Set one logit of one token: its routing is arbitrary, but the exchanges must still match."""
    router = engine.model.moe_layers()[0].router
    logits = router.logits

    def corrupted(*args: Any) -> torch.Tensor:
        logit_TE = logits(*args).clone()
        logit_TE[3, 5] = math.nan
        return logit_TE

    with patched(router, "logits", corrupted):
        yield


def train_through(
    rank: int, world: int, config: Config, corrupt: Corruption | None
) -> list[tuple[str, str, str]]:
    """Return decision, digest of the state and loss of each step; rank 1 corrupts step `BAD`.

    Without a corruption, step `BAD` is skipped too: the expected result.
    """
    here, data = worlds.init_distributed("cpu"), open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    guard, results = StepGuard(config.guard), []
    for step in range(LAST + 1):
        bad = step == BAD
        with corrupt(engine) if corrupt is not None and bad and rank == 1 else nullcontext():
            totals = steps.compute_gradients(engine, training_batches(data.train, engine, step))
        kind, action = guard.check(step, totals.loss_sum, steps.grad_norm(totals))
        before = digest_of(engine)
        result = steps.update(
            engine, totals, RATE, apply=action is StepAction.APPLY and not (bad and corrupt is None)
        )
        assert result.updated is (not bad)
        assert (digest_of(engine) == before) is bad, (
            f"step {step}: {action.value}, but the state disagrees"
        )
        results.append((f"{kind.value}, {action.value}", digest_of(engine), totals.loss_sum.hex()))
    return results


def settings(mode: str) -> Config:
    return tiny("moe.capacity.factor=1.25", "moe.balance.bias=0.01", f"parallel.mode={mode}")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def skipped_run(request: pytest.FixtureRequest) -> tuple[str, list[tuple[str, str, str]]]:
    """Return a mode and its run without corruption, in which step `BAD` is skipped."""
    return request.param, run_ranks(2, train_through, settings(request.param), None)[0]


@pytest.mark.parametrize("corrupt", [nan_loss, inf_in_one_expert, nan_logit])
def test_one_bad_number_on_one_rank_skips_the_step_on_all_ranks(
    corrupt: Corruption, skipped_run: tuple[str, list[tuple[str, str, str]]]
) -> None:
    """Parameters, moments, step counts and biases do not change; later steps are applied."""
    mode, expected = skipped_run
    here, there = run_ranks(2, train_through, settings(mode), corrupt)
    assert here == there
    decisions = [decision for decision, _, _ in here]
    assert decisions == ["good, taken"] * BAD + ["not finite, skipped"] + ["good, taken"] * (
        LAST - BAD
    )
    assert [(state, loss) for _, state, loss in here[BAD + 1 :]] == [
        (state, loss) for _, state, loss in expected[BAD + 1 :]
    ]
    assert here[BAD][1] == expected[BAD][1]
