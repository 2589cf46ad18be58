"""Classifiers, their inputs, and their formulas one sample at a time, for the tests here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.config.schema import ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from dmoe.models.classifier import Classifier

GATED = ModelConfig(dim=6, layers=0, fusion="gated")
ALONE = ModelConfig(dim=6, layers=0, head="experts")
FIXED = MoEConfig(
    num_experts=2,
    top_k=1,
    expert_dim=5,
    router=RouterConfig(kind="fixed"),
    experts=ExpertsConfig(kind="relu"),
)
SOFT = MoEConfig(
    num_experts=4,
    top_k=4,
    expert_dim=5,
    router=RouterConfig(kind="soft"),
    experts=ExpertsConfig(kind="relu"),
)
BUDGET = MoEConfig(
    num_experts=3,
    top_k=3,
    router=RouterConfig(kind="budget", renormalize=False, budget=0.7),
    experts=ExpertsConfig(kind="relu", shapes=[[], [50], [64, 32]]),
)
SPARSE = MoEConfig(num_experts=4, top_k=2, expert_dim=5, experts=ExpertsConfig(kind="relu"))
TWO, THREE = [4, 3], [4, 3, 2]
MISSING = {2: [(), (0,), (1,), (), (0,)], 3: [(), (0,), (1,), (2,), (0, 2)]}
"""Which streams of each of five samples are missing."""


def build_classifier(
    config: ModelConfig, moe: MoEConfig, widths: list[int], classes: int = 3, **options: object
) -> Classifier:
    """Build a float64 model with large weights; zero biases or gates would hide errors."""
    model = Classifier(config, moe, widths, classes, **options).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return model


def random_samples(widths: list[int], count: int = 5, missing: bool = False) -> Tensor:
    x_BW = torch.randn(
        count, sum(widths), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for sample, lost in enumerate(MISSING[len(widths)] if missing else []):
        for stream in lost:
            x_BW[sample, sum(widths[:stream]) :][: widths[stream]] = math.nan
    return x_BW


def gated_reference(model: Classifier, x_W: Tensor) -> Tensor:
    """Compute the logits of one sample.

    A sigmoid gate if both of two streams are present, else a softmax over those that are.
    """
    fusion, encoded = model.fusion, {}
    for s, part in enumerate(x_W.split(model.widths)):
        if not part.isnan().any():
            inner = F.linear(part, fusion.projections[s].weight, fusion.projections[s].bias)
            encoded[s] = (
                torch.relu(inner @ fusion.encoders.experts.w_in[s])
                @ fusion.encoders.experts.w_out[s]
            )
    zero = x_W.new_zeros(model.config.dim)
    gate_input = (
        torch.cat([encoded.get(s, zero) for s in range(len(model.widths))]) @ fusion.gate
        + fusion.bias
    )
    if len(model.widths) == len(encoded) == 2:
        gate = torch.sigmoid(gate_input)
        y = gate * encoded[0] + (1 - gate) * encoded[1]
    else:
        logits = [*gate_input.split(model.config.dim), zero]
        total = sum(logits[s].exp() for s in encoded)
        y = sum((logits[s].exp() / total * vector for s, vector in encoded.items()), zero)
    return F.linear(y, model.head.weight, model.head.bias)


def soft_reference(model: Classifier, x_W: Tensor) -> Tensor:
    weights, experts = (model.head.router.weight @ x_W).softmax(0), model.head.experts
    return sum(
        weights[e] * (torch.relu(x_W @ experts.w_in[e]) @ experts.w_out[e]) for e in range(4)
    )


def experts_in_budget(model: Classifier, x_W: Tensor, budget: float) -> list[int]:
    """Choose experts by descending weight.

    An expert is chosen if its cost fits the remaining budget and its weight exceeds min_weight.
    """
    weights = (model.head.router.weight @ x_W).softmax(0).tolist()
    cost, left, found = [1000, 5500, 8768], budget * (1000 + 5500 + 8768), []
    for e in sorted(range(3), key=lambda e: -weights[e]):
        if weights[e] > 0.1 and cost[e] <= left:
            found.append(e)
            left -= cost[e]
    return found


def budget_reference(model: Classifier, x_W: Tensor, budget: float = 0.7) -> Tensor:
    """Compute one sample: 100 -> 10, 100 -> 50 -> 10, 100 -> 64 -> 32 -> 10."""
    weights, y = (model.head.router.weight @ x_W).softmax(0), x_W.new_zeros(10)
    for e in experts_in_budget(model, x_W, budget):
        matrices = [
            w for name, w in model.head.experts.named_parameters() if name.startswith(f"{e}.")
        ]
        hidden = x_W @ matrices[0]
        for matrix in matrices[1:]:
            hidden = torch.relu(hidden) @ matrix
        y = y + weights[e] * hidden
    return y


CASES: dict[
    str, tuple[ModelConfig, MoEConfig, list[int], int, bool, Callable[[Classifier, Tensor], Tensor]]
] = {
    "gated, two streams": (GATED, FIXED, TWO, 3, False, gated_reference),
    "gated, one of two missing": (GATED, FIXED, TWO, 3, True, gated_reference),
    "gated, three streams": (
        GATED,
        replace(FIXED, num_experts=3),
        THREE,
        3,
        False,
        gated_reference,
    ),
    "gated, some of three missing": (
        GATED,
        replace(FIXED, num_experts=3),
        THREE,
        3,
        True,
        gated_reference,
    ),
    "soft": (ALONE, SOFT, TWO, 3, False, soft_reference),
    "budget": (ALONE, BUDGET, [64, 36], 10, False, budget_reference),
}
