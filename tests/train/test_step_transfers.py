"""What a step asks of a GPU's host, seen without a GPU: pinned copies, no table of shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dmoe.distributed.fsdp import _nested, prefetch
from dmoe.distributed.gradients import _squared_norm
from dmoe.distributed.init import ProcessInfo


def test_inputs_go_to_a_gpu_from_pinned_memory_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []
    tensor = torch.zeros(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **kwargs: seen.append((args, kwargs)) or self
    )
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for device in (cuda, cpu):
        ProcessInfo(0, 1, 0, device).send(tensor)
    options = {"non_blocking": True}
    assert seen == ["pinned", ((cuda,), options), ((cpu,), options)]


def test_squared_norms_read_nothing_on_the_host() -> None:
    """On the meta device a host read raises; values: that of the formula."""
    layers = [nn.Linear(3, 4).to(device) for device in ("cpu", "meta")]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
    assert _squared_norm(layers[0].parameters(), 2) == 16 / 2
    assert _squared_norm(layers[1].parameters(), 2).is_meta


class Unit(nn.Module):
    def __init__(self, *inner: Unit) -> None:
        super().__init__()
        self.inner, self.lists = nn.ModuleList(inner), dict[str, Any]()

    def set_modules_to_forward_prefetch(self, units: list[Unit]) -> None:
        self.lists["forward"] = units

    def set_modules_to_backward_prefetch(self, units: list[Unit]) -> None:
        self.lists["backward"] = units


def test_each_block_gathers_its_neighbour_and_the_experts_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmoe.distributed.fsdp.FSDPModule", Unit)
    experts = [Unit() for _ in range(3)]
    first, second, third = units = [Unit(inner) for inner in experts]
    prefetch(units)  # type: ignore[arg-type]
    assert _nested(second) == [second, experts[1]]  # type: ignore[arg-type]
    assert first.lists == {"forward": [second, experts[1]]}
    assert second.lists == {"forward": [third, experts[2]], "backward": [first, experts[0]]}
    assert third.lists == {"backward": [second, experts[1]]}
