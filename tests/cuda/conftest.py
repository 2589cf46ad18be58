"""The CUDA branches without a GPU, on the CPU (values) or on the meta device (shapes, strides)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore


@pytest.fixture
def cuda_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every `is_cuda` branch on any device, as on a Hopper GPU.

    torch's own checks of `grouped_mm` run on the meta device too.
    """
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.fixture
def fake_world() -> Iterator[None]:
    """torch's fake process group: rank 3 of 8, whose collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.fixture
def known_counts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the host reads that a layer is allowed equal counts: the meta device has none.

    Two rows are sent to and received from each rank, or the number that a test parametrizes.
    """
    received: int = getattr(request, "param", 2)

    def counts(tensor: Tensor) -> list[Any]:
        if tensor.dim() > 1:
            return [counts(row) for row in tensor]
        return [received] * len(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counts)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: received)
