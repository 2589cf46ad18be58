"""The mixture-of-experts layer as the formulas say it: loops over tokens, and sums over *all* experts with mostly zero weights.

No permutation, no exchange, no slots, no custom gradient, nothing of routers/, capacity.py, balance/ or permute.py: what `verify`
holds the real layer against must not share its mistakes. Slow by design. Of the real layer it takes the weights, and the keys of the
random numbers.

Letters: T tokens, D width, E experts, K experts a token, U units.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn

from dmoe.moe.layer import MoE, MoEOutput
from dmoe.moe.metrics import LayerStats
from dmoe.moe.routing import DispatchPlan, Routing, TokenContext
from dmoe.verify.naive import experts
from dmoe.verify.naive.losses import auxiliary
from dmoe.verify.naive.queue import Choices, keep
from dmoe.verify.naive.routing import decide


def install(model: nn.Module) -> None:
    """Give every MoE layer of `model` the naive forward."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def forward(layer: MoE, x: Tensor, context: TokenContext) -> MoEOutput:
    """`y_t = sum_e weight[t, e] * expert_e(x_t)` for one process that holds every expert."""
    x_TD = x.flatten(0, -2)
    sequences = x_TD.shape[0] // x.shape[-2]
    decision = decide(layer, x_TD, context, sequences)
    kept = keep(layer, decision, sequences)
    weight_TE = combine_weights(layer, decision.weight_TE, kept.mask(decision.score_TE))
    y_TM = sum(
        (
            weight_TE[:, e : e + 1] * experts.output(layer, e, x_TD)
            for e in range(layer.num_experts)
        ),
        torch.zeros(()),
    )
    assert isinstance(y_TM, Tensor)
    if layer.shared is not None:
        y_TM = y_TM + layer.shared.w_out(
            experts.activation(layer.shared.kind, layer.shared.w_in(x_TD))
        )
    aux = auxiliary(layer, decision, context, sequences)
    return MoEOutput(
        y_TM.view(*x.shape[:-1], -1),
        aux,
        statistics(layer, decision, kept),
        *as_routing(decision, kept),
    )


def combine_weights(layer: MoE, weight_TE: Tensor, kept_TE: Tensor) -> Tensor:
    """The weights of what was kept: as they are, or divided by their sum and scaled again."""
    kept_weight_TE = weight_TE * kept_TE
    if layer.capacity.renormalize and kept_queue(layer):
        return (
            kept_weight_TE
            / (kept_weight_TE.sum(-1, keepdim=True) + 1e-20)
            * layer.router.config.scale
        )
    return kept_weight_TE


def kept_queue(layer: MoE) -> bool:
    """Whether a capacity is in force."""
    return (layer.capacity.factor if layer.training else layer.capacity.eval_factor) is not None


def statistics(layer: MoE, decision: Choices, kept: Choices) -> LayerStats:
    """Counted by walking the lists."""
    choices, survivors = [0] * layer.num_experts, [0] * layer.num_experts
    lost, weight_TE = 0, decision.weight_TE.detach()
    total, dropped = 0.0, 0.0
    for t, (made, left) in enumerate(zip(decision.experts_T, kept.experts_T, strict=True)):
        lost += bool(made) and not left
        for e in made:
            choices[e] += 1
            total += float(weight_TE[t, e])
            dropped += 0.0 if e in left else float(weight_TE[t, e])
        for e in left:
            survivors[e] += 1
    double = torch.tensor([dropped, total], dtype=weight_TE.dtype)
    counts = torch.tensor([choices, survivors])
    return LayerStats(counts[0], counts[1], double[0], double[1], torch.tensor(lost), kept.slots)


def as_routing(decision: Choices, kept: Choices) -> tuple[Routing, DispatchPlan]:
    """Return the decision and what was kept of it, one column per expert."""
    score_TE = decision.score_TE.detach()
    expert_TE = torch.arange(score_TE.shape[1]).expand_as(score_TE)
    keep_TE = kept.mask(score_TE)
    logit_TE, selected_TE = decision.logit_TE.detach(), decision.mask(score_TE)
    return (
        Routing(expert_TE, score_TE, score_TE, logit_TE, selected_TK=selected_TE),
        DispatchPlan(expert_TE, score_TE * keep_TE, keep_TE, score_TE.shape[1]),
    )
