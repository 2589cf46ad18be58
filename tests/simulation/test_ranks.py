"""`dmoe simulate` against real gloo ranks: choices and drops to the last one, and losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dmoe
from dmoe.config.load import to_yaml
from dmoe.simulation.drops import kept_experts
from dmoe.simulation.replay import replay_steps
from dmoe.simulation.selection import with_next_choices
from dmoe.simulation.simulate import setting_of, simulate
from dmoe.simulation.trace import by_rank, open_trace, rows_of_ranks
from tests.ranks import run_ranks
from tests.simulation.runs import BASE, train
from tests.tiny import tiny

SCORE = ("moe.capacity.priority=score", "moe.capacity.group=global")
TWO = (2, 2, ("train.micro_batch=2", "moe.balance.bias=0.01"))
NEXT = ("moe.exchange=padded", "moe.capacity.overflow=next_choice", *SCORE)
FOUR = (4, 2, ("train.micro_batch=1", "moe.balance.bias=0.01", *NEXT))
EIGHT = (8, 8, ("moe.router.kind=noisy",))
CASES = [
    pytest.param(*TWO, marks=pytest.mark.ranks),
    pytest.param(*FOUR, marks=pytest.mark.ranks),
    pytest.param(*EIGHT, marks=pytest.mark.slow),
]


def on_rank(rank: int, world: int, folder: Path, ep: int, overrides: tuple[str, ...]) -> object:
    torch.set_num_threads(1)
    losses, kept_FLTK = train(folder, f"parallel.ep={ep}", "tracking.trace=choices", *overrides)
    return losses, kept_FLTK.numpy()


@pytest.mark.parametrize(("world", "ep", "overrides"), CASES)
def test_one_process_has_the_drops_and_losses_of_all_ranks(
    world: int, ep: int, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    real = run_ranks(world, on_rank, tmp_path / "real", ep, overrides, timeout=180)
    config = tiny(*BASE, f"train.run_dir={tmp_path / 'virtual'}", *overrides)
    folder = simulate(config, to_yaml(config), world, ep, quiet=True)
    mine = with_next_choices(open_trace(folder), config)
    theirs = open_trace(tmp_path / "real")
    losses = [line["loss"] for line in dmoe.Run(folder).metrics.of("train")]
    assert losses == pytest.approx(real[0][0], rel=1e-5)
    setting = setting_of(config, world, ep)
    n, length = setting.micro_batch, mine.spec.seq_len
    accumulation = 8 // (world * n)
    for traffic in replay_steps(mine, setting):
        step = traffic.step
        expert_NLK = mine.choices(step)
        assert (expert_NLK == theirs.choices(step)).all()
        offers = mine.has_next_choices
        predicted = kept_experts(
            expert_NLK, (mine.all_scores if offers else mine.scores)(step), setting.capacity,
            mine.spec, ranks=world, micro_batch=n,
            next_NLS=mine.next_choices(step) if offers else None,
        )  # fmt: skip
        assert (predicted < 0).any()
        shape = (accumulation, world, n * length, *predicted.shape[1:])
        for rank, (_, kept_FLTK) in enumerate(real):
            forwards = slice(step * accumulation, (step + 1) * accumulation)
            found = kept_FLTK[forwards].transpose(0, 2, 1, 3)
            assert (predicted.reshape(shape)[:, rank] == found).all(), (step, rank)
        count_BLE = mine.spec.count(predicted).astype(int)
        assert (by_rank(count_BLE, world, ep, n) == traffic.sent_ALWP).all()
        assert (rows_of_ranks(traffic.sent_ALWP) == traffic.rows_ALW).all()
