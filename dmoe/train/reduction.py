"""The control reduction of a step: one float64 vector, summed over all ranks and read once.

Letters: L MoE layers, E experts, n auxiliary losses per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dmoe.models.base import IGNORE_INDEX, ModelOutput
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import MetricsFn

NUM_SCALARS = 9
NUM_LAYER_SCALARS = 4


@dataclass(frozen=True)
class BatchCounts:
    """What this rank's part of a global batch holds."""

    targets: int
    """Targets that are predicted."""
    tokens: int
    """Tokens that are not padding."""
    target_bytes: int = 0
    """Bytes of text of the targets."""


@dataclass(frozen=True)
class Requests:
    """Requests of one rank that all ranks must know; any rank's request is enough."""

    stop: bool = False
    """Stop after this step (SIGTERM, SIGINT)."""
    save: bool = False
    """Save after this step (SIGUSR1)."""
    failed: bool = False
    """A background save has failed on this rank."""


@dataclass(frozen=True)
class LayerTotals:
    """Sums of one MoE layer over all ranks and accumulation steps; fields as in LayerStats."""

    aux: dict[str, float]
    """Auxiliary losses without coefficients, each the mean over its token groups."""
    choice_counts: list[int]
    """Assignments of each expert before any drop."""
    kept_counts: list[int]
    """Rows that each expert computed."""
    dropped_weight: float
    total_weight: float
    fully_dropped_tokens: int
    slots: int
    num_zero_cost: int = 0
    """Number of zero-cost experts (highest ids), which have no slots."""

    @property
    def drop_rate(self) -> float:
        return 1.0 - sum(self.kept_counts) / max(1, sum(self.choice_counts))

    @property
    def load_max_over_mean(self) -> float:
        """Load of the busiest expert over the mean: 1 is perfect balance, E is collapse."""
        return max(self.choice_counts) * len(self.choice_counts) / max(1, sum(self.choice_counts))

    @property
    def padding_waste(self) -> float:
        """Fraction of the capacity's slots that no token used; 0 if dropless."""
        num_capped = len(self.kept_counts) - self.num_zero_cost
        return 1.0 - sum(self.kept_counts[:num_capped]) / self.slots if self.slots else 0.0


@dataclass(frozen=True)
class ReducedStep:
    """Sums over all ranks and accumulation steps of a step, equal on all ranks."""

    squared_grad_norm: float
    """Square of the global gradient norm."""
    squared_expert_grad_norm: float
    """The experts' part of it."""
    loss_sum: float
    """Cross-entropy in nats over all targets of the global batch."""
    target_bytes: float
    """Bytes of text of those targets."""
    num_targets: int
    """Targets of the global batch that are predicted."""
    num_tokens: int
    """Its tokens that are not padding."""
    requests: Requests
    """Requests of any rank."""
    layers: list[LayerTotals]
    modules: list[LayerTotals] = field(default_factory=list)
    """The same for each adapter layer."""
    taken: bool = False
    """The device has taken the step, if it was finite."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per target."""
        return self.loss_sum / max(1, self.num_targets)

    @property
    def kept_LE(self) -> list[list[int]]:
        """Rows that each expert of each MoE layer computed."""
        return [layer.kept_counts for layer in self.layers]


def pack(
    squared_norms: Tensor, outputs: list[ModelOutput], counts: BatchCounts, requests: Requests
) -> Tensor:
    """Build this rank's vector for the reduction.

    Args:
        squared_norms: [2]: of the dense and the expert gradients.
        outputs: of each accumulation step.
        counts: of this rank's batches.
        requests: of this rank.

    Returns:
        float64: dense and expert squared norm, loss, bytes, targets, tokens, stop, save, failed;
        then auxiliary losses [L n] and counts [L (2 E + 4)]. Adapter layers follow the MoE layers.
    """
    loss = torch.stack([o.loss_sum.double() for o in outputs if o.loss_sum is not None]).sum()
    sizes = (counts.target_bytes, counts.targets, counts.tokens)
    values = (*sizes, requests.stop, requests.save, requests.failed)
    scalars = [torch.full_like(loss[None], float(value)) for value in values]
    head = torch.cat([squared_norms.to(loss), loss[None], *scalars])
    if not _layer_stats(outputs[0]):
        return head
    losses = [
        [value.double() for layer in _aux_losses(o) for value in layer.values()] for o in outputs
    ]
    aux = torch.stack([torch.stack(values) if values else head[:0] for values in losses])
    stats = torch.stack(
        [torch.cat([layer.as_vector() for layer in _layer_stats(o)]) for o in outputs]
    )
    return torch.cat([head, aux.mean(0), stats.sum(0)])


def unpack(numbers: list[float], template: ModelOutput) -> ReducedStep:
    """Split the reduced vector; `template` is any output of the step, for names and shapes."""
    rest = iter(numbers[NUM_SCALARS:])
    losses = [{name: next(rest) for name in layer} for layer in _aux_losses(template)]
    layers = []
    for aux, layer in zip(losses, _layer_stats(template), strict=True):
        num_experts = len(layer.choice_E)
        counts = list(islice(rest, 2 * num_experts + NUM_LAYER_SCALARS))
        layers.append(
            LayerTotals(
                aux=aux,
                choice_counts=[int(n) for n in counts[:num_experts]],
                kept_counts=[int(n) for n in counts[num_experts : 2 * num_experts]],
                dropped_weight=counts[-4],
                total_weight=counts[-3],
                fully_dropped_tokens=int(counts[-2]),
                slots=round(counts[-1]),
                num_zero_cost=layer.num_zero_cost,
            )
        )
    num_moe_layers = len(template.stats)
    return ReducedStep(
        squared_grad_norm=numbers[0] + numbers[1],
        squared_expert_grad_norm=numbers[1],
        loss_sum=numbers[2],
        target_bytes=numbers[3],
        num_targets=int(numbers[4]),
        num_tokens=int(numbers[5]),
        requests=Requests(*(number > 0 for number in numbers[6:NUM_SCALARS])),
        layers=layers[:num_moe_layers],
        modules=layers[num_moe_layers:],
    )


def _aux_losses(output: ModelOutput) -> list[dict[str, Tensor]]:
    """Return the losses of MoE layers, then of adapter layers."""
    return [*output.aux, *output.module_aux]


def _layer_stats(output: ModelOutput) -> list[LayerStats]:
    """Return the counts of MoE layers, then of adapter layers."""
    return [*output.stats, *output.module_stats]


def count_batches(batches: Sequence[Any], target_bytes: int = 0) -> BatchCounts:
    """Count the targets that are predicted and the tokens that are not padding."""
    targets = sum(int((batch.target != IGNORE_INDEX).sum()) for batch in batches)
    tokens = sum(
        batch.target.numel() if batch.valid_BS is None else int(batch.valid_BS.sum())
        for batch in batches
    )
    return BatchCounts(targets, tokens, target_bytes)


def detached(output: ModelOutput) -> ModelOutput:
    """Return the output without its graph, which would keep all micro-batches' activations."""
    assert output.loss_sum is not None
    return ModelOutput(
        None,
        output.loss_sum.detach(),
        [_detach_all(layer) for layer in output.aux],
        output.stats,
        module_aux=[_detach_all(layer) for layer in output.module_aux],
        module_stats=output.module_stats,
    )


def _detach_all(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in losses.items()}


class NullStepRecorder:
    """Records nothing: for a step that is not logged. `step_metrics.StepRecorder` records."""

    metrics_fn: MetricsFn | None = None
    """Metrics that the MoE layers compute in the step's forwards."""

    def mark(self, phase: str) -> None:
        """Book the time since the last mark under `phase`."""

    def collect(self, outputs: Sequence[ModelOutput]) -> None:
        """Collect the step's metrics on the device, once all gradients are reduced."""


NULL_RECORDER = NullStepRecorder()
