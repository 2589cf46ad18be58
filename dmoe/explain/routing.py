"""How a token's experts are chosen and weighed.

Letters: E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

from dmoe.config.expert_shapes import all_choices
from dmoe.config.schema import MoEConfig, RouterConfig
from dmoe.explain.section import Section
from dmoe.explain.setting import Setting

GATED = (
    "Choice: each stream of a sample goes to its own expert, its encoder; a missing one sends nothing. A gate that reads all of them "
    "joins them, element by element."
)
UNSCORED, UNCHOSEN = ("fixed", "hash"), ("soft", "expert_choice")


def describe(setting: Setting) -> Section | None:
    if setting.layer is None:
        return None
    moe = setting.config.moe
    router = moe.router
    gated = setting.config.train.task == "classification" and setting.config.model.fusion == "gated"
    words = [GATED if gated else _choice(moe), _weights(moe)]
    if router.kind not in UNSCORED:
        words.insert(0, _score(moe))
    words += _noise(router)
    numbers: dict[str, Any] = {
        "kind": router.kind,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "scale": router.scale,
    }
    if router.kind == "group_limited":
        numbers |= {"groups": router.groups, "topk_groups": router.topk_groups}
    if router.kind == "adaptive":
        numbers |= {"top_p": router.top_p, "k_min": router.k_min, "k_max": moe.top_k}
    if router.kind == "budget":
        numbers |= {"min_weight": router.min_weight, "budget": router.budget, "per": router.per}
    return Section("routing", "Routing", words, numbers)


def _score(moe: MoEConfig) -> str:
    function = (
        "softmax of the logits over all"
        if moe.router.score == "softmax"
        else "sigmoid of the logit of each of"
    )
    return f"Score: {function} {all_choices(moe)} experts, in float32 whatever the precision of the model."


def _choice(moe: MoEConfig) -> str:
    router, k = moe.router, moe.top_k
    ranked = "score + bias (the bias chooses and never weighs)" if moe.balance.bias else "score"
    best = f"the {k} experts of largest {ranked}" if k > 1 else f"the expert of largest {ranked}"
    ties = "ties go to the lower expert id, on every device"
    sentences = {
        "top_k": f"Choice: {best}; {ties}.",
        "noisy": f"Choice: {best}, where training adds noise of a learned width to the logits (Shazeer 2017); {ties}.",
        "group_limited": f"Choice: the experts form {router.groups} groups of {moe.num_experts // max(1, router.groups)} neighbours; a "
        f"group's score is the sum of its two largest; among the best {router.topk_groups} groups, {best}; {ties}.",
        "adaptive": f"Choice: by descending score, as many experts as it takes for their probabilities to reach {router.top_p:g}, at "
        f"least {router.k_min} and at most {k}; {ties}.",
        "budget": f"Choice: by descending {ranked}, of the best {k} each expert whose score is above {router.min_weight:g} and whose "
        f"cost fits what is left of a budget of {router.budget:g} times the cost of all experts; one that does not fit is passed over"
        f"{'' if router.per == 'token' else '; the scores are those of the mean over the sequence, for all of its tokens'}; {ties}.",
        "fixed": f"Choice: experts (label x {k} + 0 .. {k - 1}) mod {moe.num_experts} by the label that comes with each token (task, "
        "language or domain); nothing is learned.",
        "hash": f"Choice: {k} distinct experts by a hash of the token's id and the layer; nothing is learned, and the same token "
        "always goes the same way.",
        "soft": f"Choice: none; every token goes to all {moe.num_experts} experts.",
        "expert_choice": "Choice: each expert takes the tokens of a group that score it highest, as many as it has slots, so every "
        "expert is full and a token may have none or all. It looks at later tokens of a sequence, which a causal model must not.",
    }
    return sentences[router.kind]


def _weights(moe: MoEConfig) -> str:
    router = moe.router
    if router.kind in UNSCORED:
        steps = [f"Weights: 1/{moe.top_k} each"]
    elif router.kind == "noisy" or (router.weights_from == "chosen" and router.score == "softmax"):
        steps = ["Weights: a softmax over the chosen logits alone"]
    else:
        steps = [
            "Weights: the scores"
            if router.kind in UNCHOSEN
            else "Weights: the chosen experts' scores"
        ]
        if router.kind not in UNCHOSEN:
            steps.append(
                "divided by their sum, so that they sum to 1"
                if router.renormalize
                else "not divided by their sum"
            )
    if router.scale != 1.0:
        steps.append(f"times {router.scale:g}")
    return f"{', '.join(steps)}. They are applied where the token came from, so only rows travel."


def _noise(router: RouterConfig) -> list[str]:
    drawn = "drawn for (seed, step, layer, sequence), so the same on any number of ranks; none in evaluation"
    noise = []
    if router.kind == "noisy":
        noise.append(f"Noise: {drawn}.")
    if router.jitter:
        low, high = 1 - router.jitter, 1 + router.jitter
        noise.append(
            f"Jitter: the router sees its input times uniform noise in [{low:g}, {high:g}], {drawn}."
        )
    return noise
