"""Mixture-of-experts layer by its formulas: loops over tokens, dense sums over all experts.

No permutation, exchange, slots or custom gradient, and nothing from the routers, capacity, losses
or dispatch of `dmoe/moe`: the reference of `verify` must not share their mistakes. Slow by design.
Only the weights, the sizes of the experts' matrices and the keys of the random numbers are taken
from the real layer.

Letters: T tokens, D width, E experts, K experts per token, U loss groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.moe.experts import HeterogeneousExperts, MLPExperts
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import LayerStats, MoEOutput
from dmoe.moe.routing import DispatchPlan, Routing, TokenContext
from dmoe.verify.naive.capacity import Choices, apply_capacity, has_capacity
from dmoe.verify.naive.plugins import own_expert_output, own_loss
from dmoe.verify.naive.routing import route


def install(model: nn.Module) -> None:
    """Replace the forward of every MoE layer of `model` by the naive one."""
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
            layer.__dict__["prior"] = PriorCounts()


@dataclass
class PriorCounts:
    """Choices of every expert in the earlier forwards of one optimizer step."""

    step: int = -1
    count_E: list[int] = field(default_factory=list)

    def add(self, step: int, choices: Choices, num_experts: int) -> list[int]:
        """Return the counts before this forward of `step`, and add its choices."""
        if step != self.step:
            self.step, self.count_E = step, [0] * num_experts
        before_E = list(self.count_E)
        for chosen in choices.experts_T:
            for e in chosen:
                self.count_E[e] += 1
        return before_E


def forward(layer: MoE, x: Tensor, context: TokenContext) -> MoEOutput:
    """Compute `y_t = sum_e weight[t, e] * expert_e(x_t)` in one process that has every expert."""
    x_TD = without_padding(x.flatten(0, -2), context)
    sequences = x_TD.shape[0] // x.shape[-2]
    choices = route(layer, x_TD, context, sequences)
    prior: PriorCounts | None = layer.__dict__.get("prior")
    if prior is not None and context.noise_key is not None:
        before_E = prior.add(context.noise_key[1], choices, layer.num_experts)
        prior_LE = torch.tensor([before_E] * (layer.layer + 1))
        context = replace(context, prior_count_LE=prior_LE)
    kept = apply_capacity(layer, choices, sequences)
    weight_TE = combine_weights(layer, choices.weight_TE, kept.mask(choices.score_TE))
    y_TM = sum(
        (weight_TE[:, e : e + 1] * expert_output(layer, e, x_TD) for e in range(layer.num_experts)),
        torch.zeros(()),
    )
    assert isinstance(y_TM, Tensor)
    if layer.shared is not None:
        hidden = activation(layer.shared.kind, x_TD @ layer.shared.w_in.weight.t())
        y_TM = y_TM + hidden @ layer.shared.w_out.weight.t()
    return MoEOutput(
        without_padding(y_TM, context).view(*x.shape[:-1], -1),
        auxiliary_losses(layer, choices, context, sequences),
        layer_stats(layer, choices, kept),
        *as_routing(choices, kept, weight_TE.detach()),
    )


def without_padding(value_TX: Tensor, context: TokenContext) -> Tensor:
    """Return the rows with zeros in place of padding."""
    if context.valid_T is None:
        return value_TX
    zero_X = torch.zeros_like(value_TX[0])
    rows = zip(value_TX, context.valid_T.tolist(), strict=True)
    return torch.stack([value_X if is_valid else zero_X for value_X, is_valid in rows])


def combine_weights(layer: MoE, weight_TE: Tensor, kept_TE: Tensor) -> Tensor:
    """Return the weights of the kept choices, divided by their sum if the config says so."""
    kept_weight_TE = weight_TE * kept_TE
    if layer.capacity.renormalize and has_capacity(layer):
        sum_T1 = kept_weight_TE.sum(-1, keepdim=True) + 1e-20
        return kept_weight_TE / sum_T1 * layer.router.config.scale
    return kept_weight_TE


def layer_stats(layer: MoE, choices: Choices, kept: Choices) -> LayerStats:
    """Count choices, kept choices and dropped weight token by token."""
    choice_counts, kept_counts = [0] * layer.num_experts, [0] * layer.num_experts
    fully_dropped, weight_TE = 0, choices.weight_TE.detach()
    total, dropped = 0.0, 0.0
    for t, (chosen, remaining) in enumerate(zip(choices.experts_T, kept.experts_T, strict=True)):
        fully_dropped += bool(chosen) and not remaining
        for e in chosen:
            choice_counts[e] += 1
            total += float(weight_TE[t, e])
            dropped += 0.0 if e in remaining else float(weight_TE[t, e])
        for e in remaining:
            kept_counts[e] += 1
    weights = torch.tensor([dropped, total], dtype=weight_TE.dtype)
    counts = torch.tensor([choice_counts, kept_counts])
    return LayerStats(
        counts[0], counts[1], weights[0], weights[1], torch.tensor(fully_dropped), kept.slots
    )


def as_routing(choices: Choices, kept: Choices, weight_TE: Tensor) -> tuple[Routing, DispatchPlan]:
    """Return the choices and what was kept of them, one column per expert."""
    score_TE = choices.score_TE.detach()
    expert_TE = torch.arange(score_TE.shape[1]).expand_as(score_TE)
    keep_TE = kept.mask(score_TE)
    logit_TE, selected_TE = choices.logit_TE.detach(), choices.mask(score_TE)
    return (
        Routing(expert_TE, score_TE, score_TE, logit_TE, selected_TK=selected_TE),
        DispatchPlan(expert_TE, weight_TE, keep_TE, score_TE.shape[1]),
    )


def expert_output(layer: MoE, e: int, x_TD: Tensor) -> Tensor:
    """Apply expert e to all tokens.

    Ids from `layer.experts.num_experts` on are zero, copy and constant experts, in this order.
    """
    computed = layer.experts.num_experts
    if e >= computed:
        return _zero_cost_output(layer, e - computed, x_TD)
    if type(layer.experts) not in (MLPExperts, HeterogeneousExperts):
        return own_expert_output(layer, e, x_TD)
    first, *others = _expert_weights(layer, e)
    rows = x_TD @ first
    for weight in others:
        rows = activation(layer.experts.kind, rows) @ weight
    return rows


def _expert_weights(layer: MoE, e: int) -> list[Tensor]:
    """Return the matrices of expert e, first to last."""
    named = dict(layer.experts.named_parameters())
    if "w_in" in named:
        return [named["w_in"][e], named["w_out"][e]]
    prefix = f"{e}.w"
    own = sorted((int(n.partition(".w")[2]), n) for n in named if n.startswith(prefix))
    return [named[name] for _, name in own]


def _zero_cost_output(layer: MoE, index: int, x_TD: Tensor) -> Tensor:
    experts = layer.zero_cost
    assert experts is not None
    if index < experts.zero:
        return torch.zeros_like(x_TD)
    if index < experts.zero + experts.copy:
        return x_TD
    constant_JM = experts.get_parameter("constant_JM")
    return constant_JM[index - experts.zero - experts.copy].expand(len(x_TD), -1)


def activation(kind: str, hidden: Tensor) -> Tensor:
    """Apply the activation of an expert; the gated kinds halve the last dimension."""
    if kind == "relu":
        return hidden.clamp(min=0)
    if kind == "gelu":
        return F.gelu(hidden)
    half = hidden.shape[-1] // 2
    gate, up = hidden[..., :half], hidden[..., half:]
    return (gate * torch.sigmoid(gate) if kind == "swiglu" else F.gelu(gate)) * up


def auxiliary_losses(
    layer: MoE, choices: Choices, context: TokenContext, sequences: int
) -> dict[str, Tensor]:
    """Compute every enabled auxiliary loss, unscaled: the mean over its loss groups.

    `dmoe/moe/load_balancing` computes the same in a form that ranks can sum.

    Args:
        layer: gives the config of the losses, top_k and the number of experts.
        choices: of all tokens, before capacity.
        context: gives the counts of earlier accumulation steps.
        sequences: B.

    Returns:
        Scalar by name of the loss.
    """
    config = layer.balance
    micro = _loss_groups(choices, layer.virtual_ranks)
    losses: dict[str, Tensor] = {}
    if config.switch:
        counts = {"sequence": sequences, "micro_batch": layer.virtual_ranks, "global": 1}
        prior_LE = context.prior_count_LE if config.switch_level == "global" else None
        prior_E = None if prior_LE is None else prior_LE[layer.layer]
        groups = _loss_groups(choices, counts[config.switch_level])
        losses["switch"] = _mean([_switch(layer, choices, group, prior_E) for group in groups])
    if config.z:
        losses["z"] = _mean([_router_z(choices, group) for group in micro])
    if config.importance:
        losses["importance"] = _mean([_importance(layer, choices, group) for group in micro])
    if config.usage_std:
        losses["usage_std"] = _mean(
            [_mean_score(choices, group).std(correction=0) for group in micro]
        )
    if config.own:
        losses["own"] = own_loss(layer, choices, len(micro))
    if config.load:
        losses["load"] = _mean(
            [_cv_squared(_smooth_load(layer, choices, group)) for group in micro]
        )
    return losses


def _router_z(choices: Choices, group: range) -> Tensor:
    """Compute the mean of `logsumexp(logits)^2` (ST-MoE)."""
    tokens = _valid(choices, group)
    return _mean([torch.logsumexp(choices.logit_TE[t], 0) ** 2 for t in tokens])


def _importance(layer: MoE, choices: Choices, group: range) -> Tensor:
    """Compute the squared coefficient of variation of the experts' summed scores."""
    scores = (choices.score_TE[t] for t in _valid(choices, group))
    return _cv_squared(sum(scores, torch.zeros(layer.num_experts)))


def _smooth_load(layer: MoE, choices: Choices, group: range) -> Tensor:
    """Compute `sum_t Phi((clean - threshold) / std)` of each expert.

    The threshold is the K-th best noisy logit of the other experts (Shazeer 2017, eq. 8 to 10).
    """
    assert choices.clean_TE is not None
    assert choices.std_TE is not None
    valid = _valid(choices, group)
    if layer.top_k == layer.num_experts:
        # every expert is chosen: there is no K-th of the others
        return torch.full_like(choices.logit_TE[0], float(len(valid)))
    load = []
    for e in range(layer.num_experts):
        others = [other for other in range(layer.num_experts) if other != e]
        probabilities = []
        for t in valid:
            sorted_logits = choices.logit_TE[t][others].sort(descending=True).values
            margin = choices.clean_TE[t, e] - sorted_logits[layer.top_k - 1]
            probabilities.append(torch.special.ndtr(margin / choices.std_TE[t, e]))
        load.append(torch.stack(probabilities).sum(0))
    return torch.stack(load)


def _switch(layer: MoE, choices: Choices, group: range, prior_E: Tensor | None) -> Tensor:
    """Compute `E * sum_e f_e P_e`, with the counts of earlier accumulation steps in f."""
    count = [0] * layer.num_experts if prior_E is None else [int(n) for n in prior_E]
    for t in group:
        for e in choices.experts_T[t]:
            count[e] += 1
    mean_E = _mean_score(choices, group)
    # with a budget, the tokens of a group may all have chosen no expert
    total = max(1, sum(count))
    terms = [count[e] / total * mean_E[e] for e in range(layer.num_experts)]
    return layer.num_experts * torch.stack(terms).sum(0)


def _mean_score(choices: Choices, group: range) -> Tensor:
    scores = (choices.score_TE[t] for t in _valid(choices, group))
    return _mean([score_E / score_E.sum() for score_E in scores])


def _cv_squared(total_E: Tensor) -> Tensor:
    return total_E.var(correction=0) / total_E.mean() ** 2


def _loss_groups(choices: Choices, count: int) -> list[range]:
    """Return the groups of consecutive tokens that are not padding alone."""
    tokens = len(choices.experts_T)
    groups = [range(u * tokens // count, (u + 1) * tokens // count) for u in range(count)]
    return [group for group in groups if _valid(choices, group)]


def _valid(choices: Choices, group: range) -> list[int]:
    """Return the tokens of the group that are not padding."""
    return [t for t in group if choices.valid_T[t]]


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)
