"""A config in sentences. `dmoe explain` says more, but needs torch to work out slots and shapes; a report has to come without it.

Letters: E experts, K experts a token, C slots of an expert.
"""

from __future__ import annotations

from typing import Any

from dmoe.config.expert_shapes import all_choices, zero_cost
from dmoe.config.schema import Config, MoEConfig
from dmoe.report.format import plural

UNSCORED = ("fixed", "hash")
CHOICE = {
    "top_k": "the experts of largest score",
    "noisy": "the experts of largest score, with noise of a learned width in training",
    "group_limited": "the experts of largest score within a token's best groups of experts",
    "adaptive": "as many experts as it takes for their probabilities to reach moe.router.top_p",
    "budget": "by descending score, what weighs more than moe.router.min_weight and fits the budget of moe.router.budget",
    "fixed": "the experts that belong to the token's label; nothing is learned",
    "hash": "the experts that a hash of the token gives; nothing is learned",
    "soft": "all experts",
    "expert_choice": "each expert takes the tokens that score it highest",
}
GROUP = {
    "rank": "a rank's micro-batch",
    "sequence": "each sequence",
    "global": "the micro-batches of all ranks",
}
LOSSES = ("switch", "z", "importance", "load", "usage_std")


def meaning(config: Config, start: dict[str, Any]) -> list[str]:
    """Sentences on model, routing, capacity, balance, exchange, batch and schedule. `start`: the line a run began with, or {}."""
    if config.train.task == "classification":
        words = [_classifier(config), _samples(config), _optimization(config)]
    else:
        words = [_model(config), _batch(config), _optimization(config)]
    if config.model.moe_every:
        words[1:1] = [
            _routing(config.moe),
            _capacity(config.moe),
            _balance(config.moe),
            _exchange(config, start),
        ]
    return words


def _model(config: Config) -> str:
    model, moe = config.model, config.moe
    blocks = f"{plural(model.layers, 'block')} of width {model.dim:,}"
    if not model.moe_every:
        return f"Model: {blocks}, all dense."
    where = "every block" if model.moe_every == 1 else f"every {model.moe_every}th block"
    first = f" after the first {model.dense_first}" if model.dense_first else ""
    shared = (
        f", and {plural(moe.experts.shared, 'shared expert')} that every token passes"
        if moe.experts.shared
        else ""
    )
    widths = f"hidden width {moe.expert_dim:,}" if not moe.experts.shapes else "of different shape"
    free = f" and {zero_cost(moe.experts):,} of zero cost" if zero_cost(moe.experts) else ""
    experts = f"{moe.num_experts:,} experts ({moe.experts.kind}, {widths}){free}"
    return f"Model: {blocks}; {where}{first} holds a mixture of {experts}{shared}."


def _classifier(config: Config) -> str:
    model, moe = config.model, config.moe
    joined = "joined by a gate after an encoder each" if model.fusion == "gated" else "side by side"
    read = (
        f"the streams {', '.join(config.data.streams)}, {joined}"
        if len(config.data.streams) > 1
        else "one stream"
    )
    head = "a layer of experts" if model.head == "experts" else "linear"
    blocks = f"{plural(model.layers, 'residual feed-forward')} of width {model.dim:,}"
    return f"Model: a classifier of {read}; {blocks}; the head is {head}; {moe.num_experts:,} experts in a mixture layer."


def _routing(moe: MoEConfig) -> str:
    router = moe.router
    if router.kind in UNSCORED:
        return f"Routing: {moe.top_k} of {moe.num_experts:,} experts a token, {CHOICE[router.kind]}; each weighs 1/{moe.top_k}."
    many = (
        f"{moe.top_k} of {all_choices(moe):,} experts a token, "
        if router.kind not in ("soft", "expert_choice")
        else ""
    )
    most = "at most " if router.kind in ("adaptive", "budget") else ""
    score = "softmax of the logits" if router.score == "softmax" else "sigmoid of each logit"
    chosen = " over the chosen ones" if router.weights_from == "chosen" else ""
    weights = "divided by their sum" if router.renormalize else "not divided by their sum"
    scale = f", times {router.scale:g}" if router.scale != 1 else ""
    return f"Routing: {most}{many}{CHOICE[router.kind]}. Score: {score}{chosen}; the chosen weights are {weights}{scale}."


def _capacity(moe: MoEConfig) -> str:
    limits = moe.capacity
    if moe.router.kind == "expert_choice":
        return (
            "Capacity: an expert takes its fair share of each group's tokens, no more and no fewer."
        )
    if limits.factor is None:
        return "Capacity: dropless; an expert takes every token that chose it."
    first = (
        "first choices first, then token order"
        if limits.priority == "position"
        else "the higher score first"
    )
    full = (
        "is offered once to the token's next expert"
        if limits.overflow == "next_choice"
        else "is dropped"
    )
    held_out = "dropless" if limits.eval_factor is None else f"{limits.eval_factor:g} times"
    return (
        f"Capacity: an expert takes at most {limits.factor:g} times its fair share of {GROUP[limits.group]} ({first}); a choice beyond "
        f"that {full}. In evaluation: {held_out}."
    )


def _balance(moe: MoEConfig) -> str:
    balance = moe.balance
    terms = [f"{name} loss x {value:g}" for name in LOSSES if (value := getattr(balance, name))]
    terms += (
        [f"a bias that moves by {balance.bias:g} a step towards the experts chosen too rarely"]
        if balance.bias
        else []
    )
    return (
        f"Balance: {', '.join(terms)}."
        if terms
        else "Balance: nothing keeps the experts evenly used."
    )


def _exchange(config: Config, start: dict[str, Any]) -> str:
    world, ep = start.get("world"), start.get("ep")
    ranks = (
        "one process, which holds every expert"
        if world == 1
        else f"{world} in all, {ep} of them to one copy of the experts"
        if world is not None
        else "their number was not recorded"
    )
    how = (
        "exactly the rows there are"
        if config.moe.exchange == "packed"
        else "a fixed number of slots"
    )
    return (
        f"Ranks: {ranks}; the exchange sends {how} ({config.moe.exchange}, {config.parallel.mode})."
    )


def _batch(config: Config) -> str:
    train, length = config.train, config.data.seq_len
    tokens = train.global_batch * length
    return (
        f"Batch: {plural(train.global_batch, 'sequence')} of {length:,} tokens = {tokens:,} tokens a step, for "
        f"{plural(train.steps, 'step')} ({train.steps * tokens:,} tokens); data: {config.data.source}, "
        f"tokenizer: {config.data.tokenizer}."
    )


def _samples(config: Config) -> str:
    train = config.train
    return (
        f"Batch: {plural(train.global_batch, 'sample')} a step, for {plural(train.steps, 'step')} "
        f"({train.steps * train.global_batch:,} samples); data: {config.data.source}."
    )


def _optimization(config: Config) -> str:
    optim = config.optim
    clip = f"gradients clipped to norm {optim.clip:g}" if optim.clip is not None else "no clipping"
    return (
        f"Optimisation: AdamW, peak learning rate {optim.lr:g}, {optim.schedule} after {plural(optim.warmup, 'step')} of warm-up, "
        f"weight decay {optim.weight_decay:g}, {clip}."
    )
