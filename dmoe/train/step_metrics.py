"""Metrics of logged steps: collected on the device during the step, reduced when it is logged.

The control reduction of every step (`reduction.py`) carries what decisions need. Everything else is
here: it costs nothing in other steps, and in a logged one two small reductions (sum and maximum)
with one host read each.

Letters: L MoE layers, K experts per token, EP ranks that share the experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice

import torch
from torch import Tensor

from dmoe.distributed.exchange.comm_timer import CommTimer, comm_timers
from dmoe.distributed.gradients import all_reduce_max, all_reduce_sum, squared_router_grad_norm
from dmoe.models.base import ModelOutput
from dmoe.moe.copy_planner import CopyTotals
from dmoe.moe.metrics import MAXIMA, SUMS, LayerStats, router_metrics
from dmoe.moe.placement import ExpertPlacement
from dmoe.moe.routing import MetricsFn
from dmoe.observability.profiler import peak_memory
from dmoe.train.engine import Engine
from dmoe.train.reduction import NullStepRecorder

NUM_BIAS_VALUES = 3  # smallest, largest, mean
PHASES = ("data", "forward", "backward", "exchange", "optimizer", "other")
"""Phases of a step; "exchange" is the time in all-to-alls of forward and backward."""


@dataclass(frozen=True)
class LayerMetrics:
    """Metrics of one MoE layer over all ranks and accumulation steps."""

    sums: dict[str, list[float]]
    """Those of `moe.metrics.router_metrics` that add up."""
    maxima: dict[str, float]
    traffic: list[list[int]]
    """[EP][EP]: rows sent from EP rank i to EP rank j, summed over the expert replicas."""
    bias: tuple[float, ...] | None
    """Smallest, largest and mean bias after the step; None without `balance.bias`."""


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one logged step over all ranks."""

    layers: list[LayerMetrics]
    squared_router_grad_norm: float
    """Square of the norm of the routers' gradients; a part of the dense ones."""
    all_to_all_bytes: int
    """Bytes sent to other ranks in the all-to-alls of forward and backward; no gradients."""
    seconds: dict[str, float]
    """Time of each phase, mean over the ranks."""
    straggler: float
    """Longest time of any rank for data and forward without all-to-alls, over the mean. Without
    backward, which under DDP ends with waiting for the gradients of the slowest rank, so that all
    ranks would look equally slow."""
    memory: int
    """Peak memory in bytes, of the rank with the highest."""
    peak_flops: float
    """FLOP/s of all ranks together, as measured at the start."""
    copies: list[CopyTotals]
    """Of each MoE layer, summed over the ranks; empty without copies for the step."""


class StepRecorder(NullStepRecorder):
    """Records one logged step. Made on all ranks before its first forward."""

    metrics_fn: MetricsFn | None = staticmethod(router_metrics)

    def __init__(self, engine: Engine, began: float) -> None:
        """`began`: start of the step (`time.monotonic`); its data were read since then."""
        self.engine = engine
        self.timer = StepTimer(engine.process.device, comm_timers(engine.model), began)
        self.timer.mark("data")
        self._sums = torch.empty(0)
        """float64: sums and traffic of all layers, squared router gradient norm, bytes, copies."""
        self._maxima: list[Tensor] = []
        self._widths: list[int] = []
        """Length of each of a layer's SUMS."""

    def mark(self, phase: str) -> None:
        self.timer.mark(phase)

    def collect(self, outputs: Sequence[ModelOutput]) -> None:
        """Collect the step's metrics on the device. No collective, no host read."""
        engine, sent_bytes = self.engine, self.timer.stop_comm_timers()
        layers = list(zip(*(output.stats for output in outputs), strict=True))
        self._widths = [len(layers[0][0].metrics[name]) for name in SUMS] if layers else []
        squares = squared_router_grad_norm(engine.model, engine.mesh).to(
            engine.process.device, torch.float64
        )
        placements = [layer.placement for layer in engine.model.moe_layers()]
        sums = [
            torch.cat([_sum(stats, name) for name in SUMS] + [self._traffic(stats, placement)])
            for stats, placement in zip(layers, placements, strict=True)
        ]
        numbers = [float(sent_bytes), *(n for totals in self._copies for n in astuple(totals))]
        self._sums = torch.cat([*sums, squares.view(1), squares.new_tensor(numbers)])
        self._maxima = [_maximum(stats, name) for stats in layers for name in MAXIMA]

    def reduce(self, peak_flops: float) -> StepMetrics:
        """Reduce the metrics over all ranks, after the update.

        Collective: two float64 reductions, with one host read each. `peak_flops`: of this rank.
        """
        engine, seconds = self.engine, self.timer.seconds
        times = self._sums.new_tensor([peak_flops, *(seconds[phase] for phase in PHASES)])
        busy = [peak_memory(engine.process.device), seconds["data"] + seconds["forward"]]
        largest = torch.cat([*self._maxima, *self._biases(), self._sums.new_tensor(busy)])
        sums = iter(all_reduce_sum(torch.cat([self._sums, times]), engine.mesh).tolist())
        maxima = iter(all_reduce_max(largest, engine.mesh).tolist())
        num_layers, world_size = len(self._maxima) // len(MAXIMA), engine.process.world_size
        layer_sums = [self._unpack_layer(sums) for _ in range(num_layers)]
        layer_maxima = [
            dict(zip(MAXIMA, islice(maxima, len(MAXIMA)), strict=True)) for _ in range(num_layers)
        ]
        biases = [
            tuple(islice(maxima, NUM_BIAS_VALUES)) if self._has_bias else None
            for _ in range(num_layers)
        ]
        squares, sent_bytes = islice(sums, 2)
        copies = [CopyTotals(*islice(sums, len(astuple(own)))) for own in self._copies]
        total_flops = next(sums)
        mean = {phase: value / world_size for phase, value in zip(PHASES, sums, strict=True)}
        memory, slowest = maxima
        return StepMetrics(
            layers=[
                LayerMetrics(values, top, traffic, bias)
                for (values, traffic), top, bias in zip(
                    layer_sums, layer_maxima, biases, strict=True
                )
            ],
            squared_router_grad_norm=squares,
            all_to_all_bytes=int(sent_bytes),
            seconds=mean,
            straggler=slowest / (mean["data"] + mean["forward"]),
            memory=int(memory),
            peak_flops=total_flops,
            copies=copies,
        )

    def _unpack_layer(
        self, numbers: Iterator[float]
    ) -> tuple[dict[str, list[float]], list[list[int]]]:
        """Take one layer's sums and traffic from the reduced numbers."""
        sums = {
            name: list(islice(numbers, width))
            for name, width in zip(SUMS, self._widths, strict=True)
        }
        ep = self.engine.mesh.ep
        return sums, [[int(rows) for rows in islice(numbers, ep)] for _ in range(ep)]

    def _traffic(self, layer: Sequence[LayerStats], placement: ExpertPlacement) -> Tensor:
        """Return float64 [EP * EP], zero but for this rank's row: the kept rows that it sent.

        Without empty slots and zero-cost experts.
        """
        mesh = self.engine.mesh
        kept_E = torch.stack([stats.kept_E for stats in layer]).sum(0).double()
        sent = kept_E.new_zeros(mesh.ep, mesh.ep)
        sent[mesh.ep_rank] = placement.sum_per_rank(kept_E)
        return sent.flatten()

    @property
    def _copies(self) -> list[CopyTotals]:
        """Those of this rank and each MoE layer; none without copies for the step."""
        has_copies = self.engine.config.parallel.placement.copies != 0
        packed = [layer.packed for layer in self.engine.model.moe_layers()] if has_copies else []
        groups = [getattr(dispatcher, "expert_group", None) for dispatcher in packed]
        return [group.timer.copies for group in groups if group is not None]

    @property
    def _has_bias(self) -> bool:
        return bool(self.engine.config.moe.balance.bias)

    def _biases(self) -> list[Tensor]:
        """Return smallest, largest and mean bias of each layer.

        Equal bits on all ranks, so the maximum over the ranks is the value, of the smallest too.
        """
        if not self._has_bias:
            return []
        biases = [layer.balance_bias.double() for layer in self.engine.model.moe_layers()]
        return [torch.stack([bias_E.amin(), bias_E.amax(), bias_E.mean()]) for bias_E in biases]


def _sum(layer: Sequence[LayerStats], name: str) -> Tensor:
    return torch.stack([stats.metrics[name] for stats in layer]).sum(0)


def _maximum(layer: Sequence[LayerStats], name: str) -> Tensor:
    return torch.stack([stats.metrics[name] for stats in layer]).amax(0)


class StepTimer:
    """Time of each phase of one step, on this rank.

    Each `mark` books the time since the last one under a phase, less the time in all-to-alls, which
    is a phase of its own. On CUDA every mark and both ends of every all-to-all wait for the device,
    so only logged steps are timed. Work of the previous step that the device has not finished falls
    into the first phase, the data.
    """

    def __init__(self, device: torch.device, timers: Sequence[CommTimer], began: float) -> None:
        """Start the timers of the all-to-alls. `began`: start of the step (`time.monotonic`)."""
        self.device, self.comm_timers = device, timers
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last_mark, self._comm_seconds = began, 0.0
        for timer in timers:
            timer.start(self.now)

    def now(self) -> float:
        """Return the time in seconds, once the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def mark(self, phase: str) -> None:
        now, comm_seconds = self.now(), sum(timer.seconds for timer in self.comm_timers)
        self.seconds["exchange"] += comm_seconds - self._comm_seconds
        self.seconds[phase] += now - self._last_mark - (comm_seconds - self._comm_seconds)
        self._last_mark, self._comm_seconds = now, comm_seconds

    def stop_comm_timers(self) -> int:
        """Stop the timers of the all-to-alls; return the bytes that this rank has sent."""
        for timer in self.comm_timers:
            timer.stop()
        return sum(timer.sent_bytes for timer in self.comm_timers)
