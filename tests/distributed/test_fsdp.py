"""`parallel.mode: fsdp` equals training on one process, to ten digits of float64.

A reduction that is missing, doubled or divided by the number of ranks changes the first norm.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._pytree import tree_leaves

from dmoe.config.errors import ConfigError
from dmoe.distributed.data_parallel import FSDPStrategy
from dmoe.distributed.fsdp import shard_dim
from dmoe.distributed.mesh import ParallelMesh
from dmoe.models.base import ModelOutput
from tests.distributed.runs import Trace, trace
from tests.distributed.test_equality import compare, one_process
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

FSDP = "parallel.mode=fsdp"
DROPPING = (
    "moe.capacity.factor=1.0",
    "train.global_batch=16",
    "train.micro_batch=2",
)  # two accumulation steps

CLIPPED = [
    "model.tie_embeddings=false",
    "model.dense_first=1",
    "moe.router.score=sigmoid",
    "optim.clip=0.05",
]
DENSE = ["model.moe_every=0", "model.dense_dim=40"]


@cache
def alone(*settings: str) -> Trace:
    return one_process(tiny(*settings), 3, torch.float64)


def same_on_ranks(world: int, ep: int, virtual: int, *settings: str) -> Trace:
    """Compare three steps on `world` ranks with one process of as many virtual ranks."""
    reference = alone(*settings, f"parallel.virtual_ranks={world * virtual}")
    spread = tiny(*settings, FSDP, f"parallel.ep={ep}", f"parallel.virtual_ranks={virtual}")
    for rank in run_ranks(world, trace, spread, 3, torch.float64):
        compare(reference, rank, 1e-10)
    return reference


@pytest.mark.parametrize("exchange", ["packed", "padded"])
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, 4), (4, 1)])
def test_every_mesh_and_exchange(world: int, ep: int, exchange: str) -> None:
    reference = same_on_ranks(world, ep, 4 // world, *DROPPING, f"moe.exchange={exchange}")
    assert sum(reference.kept[0]) < sum(reference.choices[0]), (
        "nothing was dropped: the test would prove less than it says"
    )


@pytest.mark.parametrize(
    "settings",
    [
        [
            "moe.experts.shared=1",
            "moe.experts.kind=gelu",
            "moe.top_k=1",
            "moe.router.renormalize=false",
            "train.recompute=true",
        ],
        CLIPPED,
        [
            "moe.balance.switch_level=global",
            "train.global_batch=16",
            "train.micro_batch=2",
            "train.recompute=true",
        ],
        DENSE,
    ],
    ids=[
        "switch-shared-recompute",
        "untied-dense-first-clipped",
        "global-accumulated-recompute",
        "dense",
    ],
)
def test_every_kind_of_model(settings: list[str]) -> None:
    reference = same_on_ranks(4, 1 if settings == DENSE else 2, 1, *settings)
    assert (max(reference.clips) < 1.0) == (settings == CLIPPED)


def test_an_odd_world_size_that_divides_nothing() -> None:
    """Three ranks hold 3, 3 and 2 of 8 experts, and 11, 11 and 10 rows of 32."""
    same_on_ranks(3, 1, 1, "moe.expert_dim=20", "train.global_batch=6")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp_equals_ddp_in_float32_and_bf16(precision: str) -> None:
    """float64 uses another reduction path in FSDP2, and no autocast. Two ranks sum in one order."""
    settings = (f"train.precision={precision}", "parallel.ep=1")
    replicated, sharded = (
        run_ranks(2, trace, tiny(*settings, mode), 3)[1] for mode in ("parallel.mode=ddp", FSDP)
    )
    compare(replicated, sharded, 1e-6)


def test_fp16_is_refused_on_ranks() -> None:
    accelerator = cast(Accelerator, SimpleNamespace(scaler="one"))
    with pytest.raises(ConfigError, match=r"train\.precision.*parallel\.mode=ddp"):
        FSDPStrategy(nn.Linear(2, 2), ParallelMesh(world_size=2), accelerator)


def test_the_output_is_a_pytree() -> None:
    """FSDP2 before torch 2.13 finds the tensors of an output only in a pytree."""
    loss, aux = torch.ones(()), torch.ones(2)
    assert {loss, aux} <= set(tree_leaves(ModelOutput(None, loss, [{"switch": aux}], [])))


def test_one_process_has_nothing_to_shard() -> None:
    compare(alone(*DROPPING), one_process(tiny(*DROPPING, FSDP), 3, torch.float64), 1e-15)


@pytest.mark.parametrize(
    ("shape", "parts", "dim"),
    [((8, 32, 48), 4, 0), ((2, 32, 48), 4, 1), ((2, 30, 48), 4, 2), ((2, 30, 50), 4, 0)],
)
def test_shard_dim(shape: tuple[int, ...], parts: int, dim: int) -> None:
    assert shard_dim(torch.Size(shape), parts) == dim
