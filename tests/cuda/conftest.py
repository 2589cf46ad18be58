"""The CUDA branches without a GPU, on the CPU (values) or on the meta device (shapes, strides)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every `is_cuda` branch on any device, as on a Hopper GPU.

    torch's own checks of `grouped_mm` run on the meta device too.
    """
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
