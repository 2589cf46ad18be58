"""What all ranks know of a step: one float64 vector, summed once, read once.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from dmoe.models.base import ModelOutput
from dmoe.moe.metrics import LayerStats

HEAD = 7
STATS_TAIL = 4


@dataclass(frozen=True)
class Requests:
    """What one rank has heard and all must know before they go on; summed over the ranks, so that one is enough."""

    stop: bool = False
    """Told to end after this step (SIGTERM, SIGINT)."""
    save: bool = False
    """Told to save after this step (SIGUSR1)."""
    failed: bool = False
    """A checkpoint that is written in the background has failed here."""


@dataclass(frozen=True)
class LayerTotals:
    """Sums of one MoE layer over all ranks and accumulation steps; see `moe.stats.LayerStats` for the fields."""

    aux: dict[str, float]
    """Raw auxiliary losses, each the mean over its units in the global batch."""
    choices: list[int]
    kept: list[int]
    dropped_weight: float
    total_weight: float
    fully_dropped_tokens: int
    slots: int
    num_zero_cost: int = 0
    """The last so many experts cost nothing and have no slots."""

    @property
    def drop_rate(self) -> float:
        return 1.0 - sum(self.kept) / max(1, sum(self.choices))

    @property
    def load_max_over_mean(self) -> float:
        """The busiest expert's choices over the mean: 1 is perfect balance, E is collapse."""
        return max(self.choices) * len(self.choices) / max(1, sum(self.choices))

    @property
    def padding_waste(self) -> float:
        """Share of the capacity's slots that no token used; 0 when dropless."""
        return (
            1.0 - sum(self.kept[: len(self.kept) - self.num_zero_cost]) / self.slots
            if self.slots
            else 0.0
        )


@dataclass(frozen=True)
class ReducedStep:
    squares: float
    """Square of the global gradient norm."""
    expert_squares: float
    """The experts' part of it."""
    loss_sum: float
    """Cross-entropy in nats over all targets of the global batch."""
    read_bytes: float
    """Bytes of text those targets stand for."""
    requests: Requests
    """What some rank asks for."""
    layers: list[LayerTotals]
    modules: list[LayerTotals] = field(default_factory=list)
    """The same of each place with modules."""


def pack(
    squares: Tensor, outputs: list[ModelOutput], read_bytes: int, requests: Requests
) -> Tensor:
    """float64 vector of this rank's shares: [dense squares, expert squares, loss, bytes, stop, save, failed] + aux [L * n] +
    stats [L * (2E + 4)]; places with modules are layers too, after the others."""
    loss = torch.stack([o.loss_sum.double() for o in outputs if o.loss_sum is not None]).sum()
    known = (read_bytes, requests.stop, requests.save, requests.failed)
    head = torch.cat(
        [
            squares.to(loss),
            loss[None],
            *(torch.full_like(loss[None], float(number)) for number in known),
        ]
    )
    if not _stats(outputs[0]):
        return head
    losses = [[value.double() for layer in _aux(o) for value in layer.values()] for o in outputs]
    aux = torch.stack([torch.stack(values) if values else head[:0] for values in losses])
    stats = torch.stack([torch.cat([layer.as_vector() for layer in _stats(o)]) for o in outputs])
    return torch.cat([head, aux.mean(0), stats.sum(0)])


def _aux(output: ModelOutput) -> list[dict[str, Tensor]]:
    """Of mixture layers, then of modules."""
    return [*output.aux, *output.module_aux]


def _stats(output: ModelOutput) -> list[LayerStats]:
    return [*output.stats, *output.module_stats]


def unpack(numbers: list[float], like: ModelOutput) -> ReducedStep:
    """The summed vector in words; `like` is any of the step's outputs, for the names and shapes."""
    rest = iter(numbers[HEAD:])
    losses = [{name: next(rest) for name in layer} for layer in _aux(like)]
    layers = []
    for aux, layer in zip(losses, _stats(like), strict=True):
        experts = len(layer.choice_E)
        own = list(islice(rest, 2 * experts + STATS_TAIL))
        layers.append(
            LayerTotals(
                aux=aux,
                choices=[int(n) for n in own[:experts]],
                kept=[int(n) for n in own[experts : 2 * experts]],
                dropped_weight=own[-4],
                total_weight=own[-3],
                fully_dropped_tokens=int(own[-2]),
                slots=round(own[-1]),
                num_zero_cost=layer.num_zero_cost,
            )
        )
    requests = Requests(*(number > 0 for number in numbers[4:HEAD]))
    mixtures = len(like.stats)
    squares = (numbers[0] + numbers[1], numbers[1])
    return ReducedStep(
        *squares, numbers[2], numbers[3], requests, layers[:mixtures], layers[mixtures:]
    )
