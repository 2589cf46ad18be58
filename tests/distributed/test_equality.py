"""Training on one process and on N ranks is equal, for any EP size, exchange and accumulation.

Compared are loss, auxiliary losses, norm, clip factor, counts, and all weights after ten steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoe.config.schema import Config
from tests.distributed.runs import Trace, trace
from tests.ranks import run_ranks
from tests.tiny import tiny

WORLDS = [(2, 2, 2), (4, 2, 1), (4, 4, 1)]  # world, ep, virtual ranks: always four groups of tokens


def one_process(config: Config, steps: int, dtype: torch.dtype) -> Trace:
    """Run in a new process: accelerate reads the environment, and pytest's must not change."""
    return run_ranks(1, trace, config, steps, dtype)[0]


def compare(reference: Trace, other: Trace, tolerance: float) -> None:
    assert other.losses == pytest.approx(reference.losses, rel=tolerance)
    assert other.norms == pytest.approx(reference.norms, rel=tolerance)
    assert other.clips == pytest.approx(reference.clips, rel=tolerance)
    assert [a.keys() for a in other.aux] == [a.keys() for a in reference.aux]
    for mine, theirs in zip(other.aux, reference.aux, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)
    assert other.choices == reference.choices
    assert other.kept == reference.kept
    for name, value in reference.weights.items():
        difference = np.linalg.norm(other.weights[name] - value) / (np.linalg.norm(value) or 1.0)
        assert difference < tolerance * 10, f"{name} differs by {difference:.1e}"


@pytest.mark.parametrize("exchange", ["packed", "padded"])
@pytest.mark.parametrize(("world", "ep", "virtual"), WORLDS)
def test_ten_steps_are_the_same_on_one_process_and_on_ranks(
    world: int, ep: int, virtual: int, exchange: str
) -> None:
    settings = ["moe.capacity.factor=1.25", f"moe.exchange={exchange}"]
    alone = one_process(tiny(*settings, "parallel.virtual_ranks=4"), 10, torch.float32)
    ranks = run_ranks(
        world, trace, tiny(*settings, f"parallel.ep={ep}", f"parallel.virtual_ranks={virtual}"), 10
    )
    assert sum(alone.kept[0]) < sum(alone.choices[0]), (
        "nothing was dropped: the test needs dropped assignments"
    )
    for rank in ranks:
        compare(alone, rank, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ["moe.capacity.factor=1.0", "moe.capacity.priority=score", "moe.capacity.renormalize=true"],
        [
            "moe.capacity.factor=1.0",
            "moe.capacity.group=sequence",
            "moe.balance.switch_level=sequence",
            "moe.exchange=padded",
        ],
        ["moe.balance.switch_level=global", "train.global_batch=16", "train.micro_batch=2"],
        [
            "moe.experts.shared=1",
            "moe.experts.kind=gelu",
            "moe.top_k=1",
            "moe.router.renormalize=false",
            "train.recompute=true",
        ],
        [
            "moe.router.score=sigmoid",
            "moe.router.scale=2.5",
            "model.tie_embeddings=false",
            "model.dense_first=1",
        ],
    ],
    ids=["score", "sequence", "global", "switch", "sigmoid"],
)
def test_float64_to_ten_digits(settings: list[str]) -> None:
    """In float64 the difference after three steps is below 1e-10."""
    alone = one_process(tiny(*settings, "parallel.virtual_ranks=4"), 3, torch.float64)
    ranks = run_ranks(4, trace, tiny(*settings, "parallel.ep=2"), 3, torch.float64)
    compare(alone, ranks[3], 1e-10)
