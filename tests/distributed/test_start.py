"""The weights of real ranks before the first step."""

from __future__ import annotations

import pytest
import torch

from dmoe.distributed.expert_parallel import expert_parameters
from dmoe.distributed.init import init_distributed
from dmoe.moe import rng
from dmoe.moe.experts import grouped_mlp
from dmoe.train.engine import build_engine
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny


def start(rank: int, world: int, mode: str) -> dict[str, list[float]]:
    """Build an engine on a host that draws other last bits, and return sums of its weights."""
    real = rng.normal_

    def other_bits(tensor: torch.Tensor, std: float, *key: int | str) -> None:
        real(tensor, std * (1 + rank * 2**-20), *key)

    grouped_mlp.normal_ = other_bits
    config = tiny("parallel.ep=1", f"parallel.mode={mode}", "modular.bank=low_rank")
    engine = build_engine(config, init_distributed("cpu"), VOCAB)
    assert expert_parameters(engine.model)
    full = (
        (n, getattr(p, "full_tensor", lambda p=p: p)()) for n, p in engine.model.named_parameters()
    )
    return {name: [p.double().sum().item(), p.double().square().sum().item()] for name, p in full}


@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_replicas_start_equal_on_hosts_that_draw_other_bits(mode: str) -> None:
    """Experts under ddp, and the frozen dense weights that DDP does not broadcast."""
    first, second = run_ranks(2, start, mode)
    assert first == second
    assert first == run_ranks(1, start, mode)[0]
