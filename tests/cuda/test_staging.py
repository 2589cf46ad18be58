"""The copy of the state for a save in the background, with a driver that only records calls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dmoe.checkpoint.async_saver import Staging


@pytest.mark.usefixtures("cuda_branch")
def test_the_copy_is_pinned_in_one_piece_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor was pinned by itself, rounded up to a power of two: up to twice the state.

    And `clear` gave nothing back: torch's allocator of pinned memory keeps what is freed.
    """
    pinned: dict[int, int] = {}
    waited: list[bool] = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: pinned.update({address: size}) or 0,
        cudaHostUnregister=lambda address: pinned.pop(address) and 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: code)
    stream = SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    state = {
        "weight": torch.randn(65, 129),
        "strided": torch.arange(12.0).reshape(3, 4).t(),
        "none": torch.empty(0, 3),
        "half": torch.randn(3).bfloat16(),
        "step": torch.tensor(5, dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
    }
    staging = Staging()
    copied = staging.copy(state)
    assert waited
    assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())
    size = sum(tensor.nbytes for tensor in state.values())
    assert len(pinned) == 1
    assert size <= sum(pinned.values()) < size + 64 * len(state)
    pages = dict(pinned)
    state["weight"].zero_()
    assert copied["weight"].any()
    assert torch.equal(staging.copy(state)["weight"], state["weight"])
    assert pinned == pages, "the next save has the same memory"
    del state["half"]
    assert "half" not in staging.copy(state)
    assert len(pinned) == 1, "another layout has other memory, and the old is given back"
    staging.clear()
    assert not pinned
    staging.clear()


def test_on_a_cpu_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("there is no driver"))
    staging = Staging()
    assert torch.equal(staging.copy({"a": torch.ones(3)})["a"], torch.ones(3))
    assert staging.copy({}) == {}
    staging.clear()
