"""Each rank's generator is restored, or a remark says why not."""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

from dmoe.checkpoint import load, read_manifest, save
from dmoe.checkpoint.rng_state import gather_rng_state, rng_tables, set_rng_state
from tests.ranks import run_ranks

WEIGHTS = {"model.w": torch.arange(3.0)}


def restore(path: Path) -> str | None:
    tables, remark = rng_tables(read_manifest(path), None)
    if tables:
        load(path, tables, prefix=tuple(tables))
    set_rng_state(tables, None)
    return remark


def draw() -> numpy.ndarray:
    return torch.randn(7).numpy()


def resumed(rank: int, world: int, root: Path) -> list[numpy.ndarray]:
    """Return draws after the save, after a restart and restore, and after a new start."""
    torch.manual_seed(10 + rank)
    torch.rand(5)
    path = save(root, 1, WEIGHTS | gather_rng_state(None), {})
    unbroken = draw()
    torch.manual_seed(99)
    fresh = draw()
    load(path, {"model.w": torch.zeros(3)}, prefix=("model.", "optim."))
    torch.manual_seed(99)
    assert restore(path) is None
    return [unbroken, draw(), fresh]


def test_draws_after_a_resume_equal_the_uninterrupted_run(tmp_path: Path) -> None:
    results = run_ranks(3, resumed, tmp_path)
    for unbroken, again, fresh in results:
        assert (unbroken == again).all()
        assert (unbroken != fresh).any()
    assert (results[0][0] != results[1][0]).any()


def elsewhere(rank: int, world: int, path: Path) -> tuple[str | None, bool]:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    return restore(path), torch.equal(before, torch.get_rng_state())


def saved(rank: int, world: int, root: Path) -> None:
    save(root, 1, WEIGHTS | gather_rng_state(None), {})


def test_at_another_world_size_each_rank_keeps_its_own_state(tmp_path: Path) -> None:
    run_ranks(2, saved, tmp_path)
    size = torch.get_rng_state().numel()
    for world in (1, 3):
        for remark, untouched in run_ranks(world, elsewhere, tmp_path / "step-00000001"):
            assert untouched
            assert f"random.cpu 2x{size} in the checkpoint, {world}x{size} here" in remark


def test_a_checkpoint_without_random_state_is_no_error(tmp_path: Path) -> None:
    """Older checkpoints have none."""
    remark, untouched = elsewhere(0, 1, save(tmp_path, 1, WEIGHTS, {}))
    assert untouched
    assert "holds no random state" in remark


def test_a_generator_that_one_of_the_two_lacks_is_named(tmp_path: Path) -> None:
    """Saved with CUDA, resumed without: the generator that both have is restored."""
    torch.manual_seed(3)
    state = gather_rng_state(None)
    path = save(
        tmp_path, 1, WEIGHTS | state | {"random.cuda": torch.zeros(1, 16, dtype=torch.uint8)}, {}
    )
    expected = draw()
    remark = restore(path)
    assert "random.cuda 1x16 in the checkpoint, absent here" in remark
    assert "random.cpu" not in remark
    assert (draw() == expected).all()
