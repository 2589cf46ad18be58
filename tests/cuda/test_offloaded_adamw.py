"""Moments on the host: streams whose work runs late, in any order that their events allow."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.distributed.optimizers import offloaded_adamw
from dmoe.distributed.optimizers.offloaded_adamw import OffloadedAdamW

QUEUED = {"copy_", "_fused_adamw_", "_foreach_add_", "_foreach_sub_", "fill_"}
WAITS = ["up for main", "up for down", "main for up", "down for main", "up for down: slot"]
"""Every wait of the copies; the last one of an event, the second of a whole stream."""
BUCKETS = (256, 640, 2048)
"""Of 1,920 numbers: eight, which take turns in two slots; three, of which the last are under way
when the next step begins; all at once."""


class Event:
    """Done when its stream has come to it."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.is_done = stream, False
        stream.queue.append(self.finish)

    def finish(self) -> None:
        self.is_done = True

    def synchronize(self) -> None:
        self.stream.device.run(lambda: self.is_done)


class Stream:
    """Work in order: callables, and events to wait for."""

    def __init__(self, device: Device) -> None:
        self.device, self.queue = device, deque[Callable[[], Any] | Event]()
        self.name = ["main", "up", "down"][len(device.streams)]
        device.streams.append(self)

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event, kind: str = ": slot") -> None:
        wait = f"{self.name} for {event.stream.name}"
        if wait == "up for down":
            wait += kind
        self.device.waits.add(wait)
        if wait != self.device.lost:
            self.queue.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event(), "")


class Device(TorchDispatchMode):
    """Queues what writes in place, and runs it later: of the streams that can go on, any.

    `lost`: a wait that is left out.
    """

    def __init__(self, seed: int, lost: str | None) -> None:
        super().__init__()
        self.random, self.lost, self.waits = random.Random(seed), lost, set[str]()
        self.streams = list[Stream]()
        self.current = Stream(self)
        self.recorded = set[tuple[int, str]]()
        self.running = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.running or func._schema.name.partition("::")[2] not in QUEUED:
            return func(*args, **(kwargs or {}))
        self.current.queue.append(lambda: func(*args, **(kwargs or {})))
        return args[0] if func._schema.returns else None

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, is_enough: Callable[[], bool] = lambda: False) -> None:
        self.running = True
        while not is_enough():
            ready = [
                stream
                for stream in self.streams
                if stream.queue
                and (not isinstance(event := stream.queue[0], Event) or event.is_done)
            ]
            if not ready:
                assert not any(stream.queue for stream in self.streams), "streams wait in a circle"
                break
            work = self.random.choice(ready).queue.popleft()
            if not isinstance(work, Event):
                work()
        self.running = False


def groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    values = [torch.randn(30, 40), torch.randn(50), torch.randn(7, 90)]
    return [
        {"params": [torch.nn.Parameter(v)], "weight_decay": 0.1 * n} for n, v in enumerate(values)
    ]


def train(optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.randn(parameter.shape)
        optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
        optimizer.step()


def held(optimizer: torch.optim.Optimizer, *names: str) -> list[Tensor]:
    members = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][name].clone() for p in members for name in names]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Record what is pinned, by address."""
    found: dict[int, int] = {}
    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: found.update({address: size}) or 0,
        cudaHostUnregister=lambda address: found.pop(address) and 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: code)
    yield found
    gc.collect()
    assert not found, "what is pinned is given back"


def trained(patch: pytest.MonkeyPatch, seed: int, lost: str | None) -> tuple[bool, Device]:
    """Train three steps, of which one is skipped; return whether all bits are those of torch's."""
    expected = torch.optim.AdamW(groups(), lr=0.01, betas=(0.9, 0.95), fused=True)
    train(expected)
    device = Device(seed, lost)
    patch.setattr(torch.cuda, "Stream", lambda: Stream(device))
    patch.setattr(torch.cuda, "current_stream", lambda: device.current)
    patch.setattr(torch.cuda, "stream", device.on)
    patch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: device.recorded.add((tensor.data_ptr(), stream.name)),
    )
    slots = offloaded_adamw._Vectors.slots

    def used_before(vectors: Any) -> list[list[Tensor]]:
        """What ran on the main stream before may still write to the memory."""
        made = slots(vectors)
        for tensor in (tensor for slot in made for tensor in slot):
            tensor.fill_(torch.nan)
        return made

    patch.setattr(offloaded_adamw._Vectors, "slots", used_before)
    ours = OffloadedAdamW(groups(), 0.01, (0.9, 0.95), 1e-8, bucket=BUCKETS[seed % 3], on_gpu=True)
    with device:
        train(ours)
    names = ("exp_avg", "exp_avg_sq")
    equal = [
        torch.equal(*pair) for pair in zip(held(ours, *names), held(expected, *names), strict=True)
    ]
    device.run()
    weights = (o.param_groups[n]["params"][0] for n in range(3) for o in (ours, expected))
    pairs = [
        *zip(held(ours, "step"), held(expected, "step"), strict=True),
        *zip(weights, weights, strict=True),
    ]
    return all(equal) and all(torch.equal(*pair) for pair in pairs), device


def test_the_bits_are_those_of_torch_in_every_order_that_the_events_allow(
    monkeypatch: pytest.MonkeyPatch, pages: dict[int, int]
) -> None:
    waits = set[str]()
    for seed in range(21):
        with monkeypatch.context() as patch:
            equal, device = trained(patch, seed, None)
        assert equal, seed
        waits |= device.waits
        recorded = {name: {p for p, n in device.recorded if n == name} for name in ("up", "down")}
        assert recorded["up"] == recorded["down"] != set()
    assert waits == set(WAITS)


@pytest.mark.parametrize("lost", WAITS)
def test_without_one_of_its_waits_some_order_gives_other_bits(
    lost: str, monkeypatch: pytest.MonkeyPatch, pages: dict[int, int]
) -> None:
    found = []
    for seed in range(36):
        with monkeypatch.context() as patch:
            found.append(trained(patch, seed, lost)[0])
    assert not all(found)


def test_the_memory_is_pinned_in_one_piece_and_given_back(pages: dict[int, int]) -> None:
    optimizer = OffloadedAdamW(groups(), 0.01, (0.9, 0.95), 1e-8, on_gpu=True)
    assert not pages, "nothing before the first step: an evaluation needs no moments"
    optimizer.allocate_moments()
    (memory,) = optimizer.host_memory()
    assert pages == {memory.data_ptr(): memory.nbytes}
    optimizer.allocate_moments()
    assert len(pages) == 1
    del optimizer
    gc.collect()
    assert not pages
