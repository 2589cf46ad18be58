"""What is only looked at where a step is logged: collected on the device during the step, summed over the ranks when it is told.

The vector that every step sums (`totals.py`) holds what decisions are made from. All else is here, so that it costs nothing on the
steps that nobody logs, and on a logged one two small reductions (a sum and a maximum) with one host read each.

Letters: L MoE layers, K experts a token, EP ranks that share the experts.

Where the time of one step goes, on this rank.

Each `lap` books the time since the last one under a name, less what the exchanges took in between, which has a name of its own. On
CUDA every lap and both ends of every exchange wait for the device, so only steps that are logged carry a stopwatch; what the device
still had to do of the step before falls to the first part, the data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dmoe.distributed.all_to_all import CommTimer, comm_timers
from dmoe.distributed.gradients import all_reduce_max, all_reduce_sum, squared_router_grad_norm
from dmoe.models.base import ModelOutput
from dmoe.moe.metrics import MAXIMA, SUMS, LayerStats, MetricsFn, nothing_more, router_metrics
from dmoe.moe.placement import ExpertPlacement
from dmoe.observability.hardware import used_memory
from dmoe.train.engine import Engine

BIAS = 3  # smallest, largest, mean


@dataclass(frozen=True)
class LayerMeasures:
    """One MoE layer over all ranks and accumulation steps."""

    sums: dict[str, list[float]]
    """See `moe.observation.router_state`."""
    maxima: dict[str, float]
    traffic: list[list[int]]
    """[EP][EP]: rows that the ranks at place i of their row of the topology sent to place j, those of all copies together."""
    bias: tuple[float, ...] | None
    """Smallest, largest and mean, after the step; None without `balance.bias`."""


@dataclass(frozen=True)
class StepMeasures:
    layers: list[LayerMeasures]
    router_squares: float
    """Square of the norm of the routers' gradients; part of the dense ones."""
    exchanged_bytes: int
    """Bytes that left a rank for another in the all-to-alls of forward and backward; sums of gradients are not among them."""
    seconds: dict[str, float]
    """Of this step, by part, mean over the ranks."""
    straggler: float
    """The longest time a rank took for data and forward without the exchanges, over the mean. Not backward: under DDP it ends with
    waiting for the gradients of the slowest, which would make all look equally slow."""
    memory: int
    """Bytes, the peak of the rank that has the highest."""
    peak_flops: float
    """FLOP/s of all ranks together, as measured at the start."""


class NullStepRecorder:
    """A step that is not logged: nothing is asked of the layers, and no clock runs."""

    observer: MetricsFn = staticmethod(nothing_more)

    def mark(self, part: str) -> None:
        """The time since the last lap was spent on `part`."""

    def collect(self, outputs: Sequence[ModelOutput]) -> None:
        """Forward, backward and the sums of gradients are done: keep what is to be told, on the device."""


NULL_RECORDER = NullStepRecorder()


class StepRecorder(NullStepRecorder):
    """One step that is logged. Made on all ranks before its first forward."""

    observer: MetricsFn = staticmethod(router_metrics)

    def __init__(self, engine: Engine, began: float) -> None:
        """`began`: when the step began, by `time.monotonic`; until now its data were read."""
        self.engine = engine
        self.stopwatch = Stopwatch(engine.process.device, comm_timers(engine.model), began)
        self.stopwatch.mark("data")

    def mark(self, part: str) -> None:
        self.stopwatch.mark(part)

    def collect(self, outputs: Sequence[ModelOutput]) -> None:
        """No collective, no host read."""
        engine, sent = self.engine, self.stopwatch.stop_meters()
        layers = list(zip(*(output.stats for output in outputs), strict=True))
        self.widths = [len(layers[0][0].observed[name]) for name in SUMS] if layers else []
        squares = squared_router_grad_norm(engine.model, engine.mesh).to(
            engine.process.device, torch.float64
        )
        owned = [layer.placement for layer in engine.model.moe_layers()]
        sums = [
            torch.cat([_sum(parts, name) for name in SUMS] + [self._traffic(parts, ownership)])
            for parts, ownership in zip(layers, owned, strict=True)
        ]
        self.sums = torch.cat(
            [*sums, squares.view(1), torch.full_like(squares, float(sent)).view(1)]
        )
        self.maxima = [_largest(parts, name) for parts in layers for name in MAXIMA]

    def reduce(self, peak_flops: float) -> StepMeasures:
        """What all ranks know of it, after the update. Collective: two reductions of float64, with one host read each."""
        engine, seconds = self.engine, self.stopwatch.seconds
        own = self.sums.new_tensor([peak_flops, *(seconds[part] for part in PARTS)])
        busy = [used_memory(engine.process.device), seconds["data"] + seconds["forward"]]
        largest = torch.cat([*self.maxima, *self._biases(), self.sums.new_tensor(busy)])
        summed = iter(all_reduce_sum(torch.cat([self.sums, own]), engine.mesh).tolist())
        maxima = iter(all_reduce_max(largest, engine.mesh).tolist())
        count, world = len(self.maxima) // len(MAXIMA), engine.process.world_size
        rows = [self._row(summed) for _ in range(count)]
        peaks = [dict(zip(MAXIMA, islice(maxima, len(MAXIMA)), strict=True)) for _ in range(count)]
        biases = [tuple(islice(maxima, BIAS)) if self._has_bias else None for _ in range(count)]
        squares, sent, peak = islice(summed, 3)
        mean = {part: value / world for part, value in zip(PARTS, summed, strict=True)}
        memory, slowest = maxima
        return StepMeasures(
            layers=[
                LayerMeasures(sums, top, traffic, bias)
                for (sums, traffic), top, bias in zip(rows, peaks, biases, strict=True)
            ],
            router_squares=squares,
            exchanged_bytes=int(sent),
            seconds=mean,
            straggler=slowest / (mean["data"] + mean["forward"]),
            memory=int(memory),
            peak_flops=peak,
        )

    def _row(self, numbers: Iterator[float]) -> tuple[dict[str, list[float]], list[list[int]]]:
        sums = {
            name: list(islice(numbers, width))
            for name, width in zip(SUMS, self.widths, strict=True)
        }
        ranks = self.engine.mesh.ep
        return sums, [[int(rows) for rows in islice(numbers, ranks)] for _ in range(ranks)]

    def _traffic(self, parts: Sequence[LayerStats], ownership: ExpertPlacement) -> Tensor:
        """float64 [EP * EP], zero but for this rank's row: what it sent, from what was kept. Slots that stayed empty do not count, nor
        do experts of zero cost."""
        mesh = self.engine.mesh
        kept_E = torch.stack([part.kept_E for part in parts]).sum(0).double()
        sent = kept_E.new_zeros(mesh.ep, mesh.ep)
        sent[mesh.ep_rank] = ownership.sum_per_rank(kept_E)
        return sent.flatten()

    @property
    def _has_bias(self) -> bool:
        return bool(self.engine.config.moe.balance.bias)

    def _biases(self) -> list[Tensor]:
        """The same bits on all ranks, so that a maximum over the ranks is each of them, the smallest too."""
        if not self._has_bias:
            return []
        biases = [
            layer.router.get_buffer("bias_E").double() for layer in self.engine.model.moe_layers()
        ]
        return [torch.stack([bias_E.amin(), bias_E.amax(), bias_E.mean()]) for bias_E in biases]


def _sum(parts: Sequence[LayerStats], name: str) -> Tensor:
    return torch.stack([part.observed[name] for part in parts]).sum(0)


def _largest(parts: Sequence[LayerStats], name: str) -> Tensor:
    return torch.stack([part.observed[name] for part in parts]).amax(0)


PARTS = ("data", "forward", "backward", "exchange", "optimizer", "other")


class Stopwatch:
    def __init__(self, device: torch.device, meters: Sequence[CommTimer], began: float) -> None:
        """`began`: when the step began, by `time.monotonic`. The meters run until `stop_meters`."""
        self.device, self.meters = device, meters
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last, self.exchanged = began, 0.0
        for meter in meters:
            meter.start(self.now)

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def mark(self, part: str) -> None:
        now, exchanged = self.now(), sum(meter.seconds for meter in self.meters)
        self.seconds["exchange"] += exchanged - self.exchanged
        self.seconds[part] += now - self.last - (exchanged - self.exchanged)
        self.last, self.exchanged = now, exchanged

    def stop_meters(self) -> int:
        """What comes now is no exchange of this step; the bytes that this rank has sent to others in it."""
        for meter in self.meters:
            meter.stop()
        return sum(meter.sent_bytes for meter in self.meters)
