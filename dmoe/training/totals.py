"""What all ranks know of a step: one float64 vector, summed once, read once.

Letters: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmoe.models.transformer import LMOutput

__all__ = ["LayerTotals", "Requests", "StepTotals", "pack", "unpack"]

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
    lost_tokens: int
    slots: int
    free: int = 0
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
        return 1.0 - sum(self.kept[: len(self.kept) - self.free]) / self.slots if self.slots else 0.0


@dataclass(frozen=True)
class StepTotals:
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


def pack(squares: Tensor, outputs: list[LMOutput], read_bytes: int, requests: Requests) -> Tensor:
    """float64 vector of this rank's shares: [dense squares, expert squares, loss, bytes, stop, save, failed] + aux [L * n] +
    stats [L * (2E + 4)]."""
    loss = torch.stack([o.loss_sum.double() for o in outputs if o.loss_sum is not None]).sum()
    known = (read_bytes, requests.stop, requests.save, requests.failed)
    head = torch.cat([squares.to(loss), loss[None], *(torch.full_like(loss[None], float(number)) for number in known)])
    if not outputs[0].stats:
        return head
    aux = torch.stack(
        [torch.stack([v.double() for layer in o.aux for v in layer.values()]) if o.aux[0] else head[:0] for o in outputs]
    )
    stats = torch.stack([torch.cat([layer.as_vector() for layer in o.stats]) for o in outputs])
    return torch.cat([head, aux.mean(0), stats.sum(0)])


def unpack(numbers: list[float], like: LMOutput) -> StepTotals:
    """The summed vector in words; `like` is any of the step's outputs, for the names and shapes."""
    names = list(like.aux[0]) if like.aux else []
    aux, stats = numbers[HEAD : HEAD + len(names) * len(like.aux)], numbers[HEAD + len(names) * len(like.aux) :]
    layers = []
    for index, layer in enumerate(like.stats):
        experts = len(layer.choice_E)
        width = 2 * experts + STATS_TAIL
        own = stats[index * width : (index + 1) * width]
        layers.append(
            LayerTotals(
                aux=dict(zip(names, aux[index * len(names) : (index + 1) * len(names)], strict=True)),
                choices=[int(n) for n in own[:experts]],
                kept=[int(n) for n in own[experts : 2 * experts]],
                dropped_weight=own[-4],
                total_weight=own[-3],
                lost_tokens=int(own[-2]),
                slots=round(own[-1]),
                free=layer.free,
            )
        )
    requests = Requests(*(number > 0 for number in numbers[4:HEAD]))
    return StepTotals(numbers[0] + numbers[1], numbers[1], numbers[2], numbers[3], requests, layers)
