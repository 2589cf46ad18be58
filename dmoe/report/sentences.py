"""Sentences about a config, the one renderer of `dmoe explain` and of the report.

They depend on the config only and import no torch, so that a report can be written without it.
Sentences about shapes, ranks and slots are in `dmoe/explain/`.

Letters: E experts, K experts per token, C slots of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmoe.config.expert_shapes import count_choices, count_zero_cost
from dmoe.config.plugins import describe, parse
from dmoe.config.router_kinds import WORKLOADS, router_spec
from dmoe.config.schedule import describe_optimizer, describe_schedule
from dmoe.config.schema import BalanceConfig, Config, MoEConfig
from dmoe.report.capacity import capacity_sentences
from dmoe.report.format import plural
from dmoe.report.trained_part import describe_trained_part

EXCHANGE = {
    "packed": "Packed: the row counts are exchanged first, then exactly the rows that exist.",
    "padded": "Padded: all slots of every expert are sent, full or empty, so all shapes are known.",
}
SWITCH_LEVEL = {
    "sequence": "over each sequence, then averaged",
    "micro_batch": "over each (virtual) rank's micro-batch, then averaged",
    "global": "over the micro-batches of all ranks and the accumulation steps so far",
}
AUX_LOSSES = {
    "switch": "E x sum of f_e P_e, which is 1 at perfect balance for any K; f_e (share of the "
    "choices, before drops) and P_e (mean score) are taken {level}",
    "z": "mean over tokens of logsumexp(logits)^2, which keeps router logits small",
    "importance": "squared coefficient of variation of the experts' summed scores",
    "load": "squared coefficient of variation of the smooth load",
    "usage_std": "standard deviation of the experts' mean scores",
    **{"own": "{own}", "pooled": "loss of transformers, over all layers (a share per layer)"},
}
BUDGET_SCORES = {
    "token": "each token",
    "sequence": "the mean over the sequence, for all its tokens",
}
GATED_FUSION = (
    "Choice: each stream of a sample is encoded by its own expert; a missing stream is not "
    "encoded. A gate that reads all streams combines the encodings, element by element."
)


def config_sentences(config: Config, start: dict[str, Any]) -> list[str]:
    """Describe a whole config.

    `start` is the merged `start` line of the run's metrics, for the number of ranks, or {}.
    """
    sentences, moe = [model_sentence(config)], config.moe
    if config.model.moe_every:
        sentences += [*routing_sentences(config), *capacity_sentences(moe)]
        sentences += [*balance_sentences(moe), _ranks(config, start)]
    given = config.data
    data = f"Data: {describe(given.source, given.source_options, 'data.source')}"
    if config.train.task != "classification":
        data += f", tokenizer {describe(given.tokenizer, given.tokenizer_options)}"
    return [*sentences, batch_sentence(config), f"{data}.", *optimizer_sentences(config)]


def model_sentence(config: Config) -> str:
    """Describe blocks, widths and experts."""
    model, moe = config.model, config.moe
    if config.train.task == "classification":
        return _classifier(config)
    blocks = f"{plural(model.layers, 'block')} of width {model.dim:,}"
    if model.source is not None:
        size = f"{moe.num_experts:,} experts of hidden width {moe.expert_dim:,}"
        return f"Model: {model.source}, {blocks}; its mixtures have {size}."
    if not model.moe_every:
        return f"Model: {blocks}, all dense."
    which = "every block" if model.moe_every == 1 else f"every {model.moe_every}th block"
    after = f" after the first {model.dense_first}" if model.dense_first else ""
    widths = "different shapes" if moe.experts.shapes else f"hidden width {moe.expert_dim:,}"
    experts = (
        f"{moe.num_experts:,} experts ({describe(moe.experts.kind, moe.experts.options)}, {widths})"
    )
    if zero_cost := count_zero_cost(moe.experts):
        experts += f" and {zero_cost:,} of zero cost"
    if moe.experts.shared:
        experts += f", and {plural(moe.experts.shared, 'shared expert')} applied to every token"
    return f"Model: {blocks}; {which}{after} is a mixture of {experts}."


def _classifier(config: Config) -> str:
    model, streams = config.model, config.data.streams
    joined = "combined by a gate" if model.fusion == "gated" else "concatenated"
    read = f"the streams {', '.join(streams)}, {joined}" if len(streams) > 1 else "one stream"
    head = "an MoE layer" if model.head == "experts" else "linear"
    blocks = f"{plural(model.layers, 'residual feed-forward')} of width {model.dim:,}"
    experts = f"{config.moe.num_experts:,} experts per MoE layer"
    return f"Model: a classifier of {read}; {blocks}; the head is {head}; {experts}."


def routing_sentences(config: Config) -> list[str]:
    """Describe score, choice, weights and noise of the router."""
    moe, spec = config.moe, router_spec(config.moe.router.kind)
    if config.model.source is not None:
        training = "not trained" if moe.router.freeze else "trained"
        chosen = f"chooses {moe.top_k} of {moe.num_experts:,} experts per token"
        return [f"Choice and weights: the published model's own router, {training}; it {chosen}."]
    gated = config.train.task == "classification" and config.model.fusion == "gated"
    score = f"{moe.router.score} of the logits of {count_choices(moe)} experts"
    score = f"Score: {score}, in float32 whatever the precision of the model."
    choice = GATED_FUSION if gated else _choice(moe)
    if parse(moe.router.kind) is not None:
        score, choice = f"Router: {describe(moe.router.kind, moe.router.options)}.", _choice(moe)
        return [score, choice, *_noise(moe)]
    notes = ["The router is not trained (moe.router.freeze)."] if moe.router.freeze else []
    if moe.replay.from_ is not None:
        notes.append(f"In training the experts are given by {moe.replay.from_}, not chosen.")
    return [*([score] if spec.learned else []), choice, _weights(moe), *_noise(moe), *notes]


def _choice(moe: MoEConfig) -> str:
    spec = router_spec(moe.router.kind)
    most = "at most " if spec.variable_k else ""
    amount = f"{most}{moe.top_k} of {count_choices(moe):,} experts per token: "
    amount = amount if spec.ordered_choices else ""
    sentences = [f"Choice: {amount}{spec.choice}."]
    if details := DETAILS.get(moe.router.kind):
        sentences.append(details(moe))
    if spec.ranks_experts:
        if moe.balance.bias:
            sentences.append("Experts are sorted by score + bias; the bias changes no weight.")
        sentences.append("Ties go to the lower expert id, on every device.")
    return " ".join(sentences)


DETAILS: dict[str, Callable[[MoEConfig], str]] = {
    "noisy": lambda moe: "The noise is that of Shazeer 2017.",
    "group_limited": lambda moe: (
        f"The {moe.num_experts} experts form {moe.router.groups} groups of neighbours; a group's "
        f"score is the sum of its two largest; the best {moe.router.topk_groups} groups are kept."
    ),
    "adaptive": lambda moe: (
        f"top_p = {moe.router.top_p:g}; a token has at least {moe.router.k_min} and at most "
        f"{moe.top_k}."
    ),
    "budget": lambda moe: (
        f"An expert is taken if its score is above {moe.router.min_weight:g} and its cost fits the "
        f"rest of a budget of {moe.router.budget:g} times the cost of all experts, else skipped. "
        f"The scores are those of {BUDGET_SCORES[moe.router.per]}."
    ),
    "fixed": lambda moe: (
        f"Experts (label x {moe.top_k} + 0 .. {moe.top_k - 1}) mod {moe.num_experts}, by the label "
        "that comes with each token (task, language or domain)."
    ),
    "hash": lambda moe: (
        f"{moe.top_k} distinct experts by a hash of token id and layer, always the same for the "
        "same token."
    ),
    "workload": lambda moe: f"{moe.router.workload}, {WORKLOADS[moe.router.workload]}.",
    "expert_choice": lambda moe: (
        "An expert takes as many tokens of a group as it has slots, so every expert is full and a "
        "token may have no expert or all of them. The choice depends on later tokens of a "
        "sequence, which a causal model must not allow."
    ),
}
"""Optional second sentence per router kind, with the kind's numbers."""


def _weights(moe: MoEConfig) -> str:
    router, spec = moe.router, router_spec(moe.router.kind)
    over_chosen = router.weights_from == "chosen" and router.score == "softmax"
    if not spec.learned:
        steps = [f"1/{moe.top_k} each"]
    elif spec.has_noise or over_chosen:
        steps = ["a softmax over the chosen logits only"]
    elif not spec.ordered_choices:
        steps = ["the scores"]
    elif router.renormalize:
        steps = ["the chosen experts' scores", "divided by their sum, so that they sum to 1"]
    else:
        steps = ["the chosen experts' scores", "not divided by their sum"]
    if router.scale != 1.0:
        steps.append(f"times {router.scale:g}")
    return f"Weights: {', '.join(steps)}. They are applied after combine, on the token's own rank."


def _noise(moe: MoEConfig) -> list[str]:
    router = moe.router
    drawn = (
        "drawn by (seed, step, layer, sequence), equal on any number of ranks; not in evaluation"
    )
    sentences = [f"Noise: {drawn}."] if router_spec(router.kind).has_noise else []
    if router.jitter:
        low, high = 1 - router.jitter, 1 + router.jitter
        sentences.append(
            f"Jitter: the router's input is multiplied by uniform noise in [{low:g}, {high:g}], "
            f"{drawn}."
        )
    return sentences


def balance_sentences(moe: MoEConfig) -> list[str]:
    """Describe auxiliary losses and the load-balancing bias."""
    balance = moe.balance
    level = SWITCH_LEVEL[balance.switch_level]
    own = "" if balance.kind is None else describe(balance.kind, balance.options)
    sentences = [
        f"Auxiliary loss {name} x {value:g}: {AUX_LOSSES[name].format(level=level, own=own)}."
        for name, value in aux_coefficients(balance).items()
    ]
    if sentences:
        sentences.append(
            "Auxiliary losses are summed over the MoE layers and added to the cross-entropy; "
            "padding is not counted; the metrics report them without the coefficient."
        )
        if not router_spec(moe.router.kind).learned:
            sentences.append("This router learns nothing, so the losses only measure the balance.")
    if balance.bias:
        centred = ", and the mean is subtracted" if balance.recenter else ""
        sentences.append(
            f"Load-balancing bias: after each step, b_e rises by {balance.bias:g} for experts "
            f"chosen less often than the mean over the global batch, else falls{centred}."
        )
    return sentences or ["Balance: none (no auxiliary loss and no bias)."]


def aux_coefficients(balance: BalanceConfig) -> dict[str, float]:
    """Return the non-zero coefficients of the auxiliary losses by name."""
    return {name: value for name in AUX_LOSSES if (value := getattr(balance, name))}


def _ranks(config: Config, start: dict[str, Any]) -> str:
    world, ep = start.get("world"), start.get("ep")
    ranks = "not recorded" if world is None else f"{world}, expert-parallel size {ep}"
    return f"Ranks: {ranks}; {config.parallel.mode}. {EXCHANGE[config.moe.exchange]}"


def batch_sentence(config: Config) -> str:
    """Describe the global batch and the length of training."""
    train, length = config.train, config.data.seq_len
    steps, size = plural(train.steps, "step"), train.global_batch
    if train.task == "classification":
        return (
            f"Batch: {plural(size, 'sample')} per step; {steps} ({size * train.steps:,} samples)."
        )
    batch = f"{plural(size, 'sequence')} of {length:,} tokens = {size * length:,} tokens"
    return f"Batch: {batch} per step; {steps} ({size * length * train.steps:,} tokens)."


def optimizer_sentences(config: Config) -> list[str]:
    """Describe schedule and optimizer."""
    return [
        describe_schedule(config.optim, config.train.steps),
        *describe_optimizer(config.optim),
        *describe_trained_part(config),
    ]
