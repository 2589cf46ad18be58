"""Experts per token against the loss, recomputed token by token from the decisions of all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dmoe.config.schema import Config
from dmoe.distributed import init as worlds
from dmoe.moe.metrics import decisions
from dmoe.moe.routing import TokenContext
from dmoe.train import engine as engines
from dmoe.train.evaluation import evaluation_batches
from dmoe.train.routing_analysis import ComputeVsLoss, correlation
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny

pytestmark = pytest.mark.ranks

ADAPTIVE = (
    "moe.router.kind=adaptive",
    "moe.top_k=4",
    "moe.router.renormalize=false",
    "moe.router.top_p=0.7",
)
BUDGET = (
    "moe.router.kind=budget",
    "moe.top_k=4",
    "moe.router.renormalize=false",
    "moe.router.min_weight=0.15",
)
PADDED = (
    "train.eval_sequences=9",
    "train.micro_batch=2",
    "model.init_std=0.5",
)  # the last batch is partly padding

Told = tuple[list[dict[str, Any]], list[list[tuple[int, float]]]]


def evaluation(rank: int, world: int, config: Config) -> Told:
    """Return each layer's report, and by layer (experts, loss) of this rank's real tokens."""
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), VOCAB)
    difficulty, sums, seen = (
        ComputeVsLoss(engine),
        list[torch.Tensor](),
        [list[tuple[int, float]]() for _ in range(2)],
    )
    engine.wrapped_model.eval()
    for part in evaluation_batches(engine.task.open_data().held_out, engine):
        valid_T = part.valid_BS.flatten()
        with torch.no_grad():
            output = engine.wrapped_model(
                part.input, part.target, TokenContext(valid_T=valid_T, metrics_fn=decisions)
            )
        sums = difficulty.update(output.stats, output.loss_T, valid_T, sums)
        for layer, stats in enumerate(output.stats):
            for t in range(len(valid_T)):
                if valid_T[t]:
                    seen[layer].append(
                        (int(stats.metrics["chosen_TE"][t].sum()), float(output.loss_T[t]))
                    )
    return difficulty.report(sums), seen


@pytest.mark.parametrize(
    ("router", "world"), [(ADAPTIVE, 2), (BUDGET, 1)], ids=["adaptive on two ranks", "budget"]
)
def test_rows_equal_a_loop(router: tuple[str, ...], world: int) -> None:
    ranks: list[Told] = run_ranks(world, evaluation, tiny(*PADDED, *router))
    for layer in range(2):
        tokens = [token for _, seen in ranks for token in seen[layer]]
        assert len(tokens) == 9 * 16
        expected = [
            [k, len(losses), sum(losses) / len(losses)]
            for k in range(5)
            if (losses := [nats for taken, nats in tokens if taken == k])
        ]
        for told, _ in ranks:
            line = told[layer]
            assert len(line["k_loss"]) > 2, "all tokens take as many"
            assert [row[:2] for row in line["k_loss"]] == [row[:2] for row in expected]
            assert [row[2] for row in line["k_loss"]] == pytest.approx(
                [row[2] for row in expected], rel=1e-6
            )
            assert line["k_loss_correlation"] == pytest.approx(
                float(np.corrcoef(np.array(tokens).T)[0, 1]), rel=1e-6
            )


def test_tokens_without_experts_have_a_row() -> None:
    """A real token without experts has k = 0; padding has none either, but is not counted."""
    told, seen = evaluation(0, 1, tiny(*PADDED, *BUDGET, "moe.router.min_weight=0.5"))
    none = sum(taken == 0 for taken, _ in seen[0])
    assert told[0]["k_loss"][0][:2] == [0, none]
    assert 0 < none < 9 * 16


def test_nothing_is_reported_with_constant_k() -> None:
    assert evaluation(0, 1, tiny(*PADDED))[0] == [{}, {}]


def test_correlation() -> None:
    """Loss 2k: 1. Loss falling with k: -1. Equal k or equal loss for all: none."""
    assert correlation([[0, 0, 0], [3, 6, 12], [2, 8, 32]]) == pytest.approx(1)
    assert correlation([[1, 5, 25], [1, 4, 16], [1, 3, 9]]) == pytest.approx(-1)
    assert correlation([[0, 0, 0], [3, 6, 14]]) is None
    assert correlation([[2, 0.6, 0.18], [1, 0.3, 0.09]]) is None
