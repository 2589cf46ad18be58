"""How many tokens an expert takes, who comes first, and what becomes of the others.

Letters: T_g tokens of a group, E experts, K experts a token, G groups of one forward, C slots of one (group, expert).
"""

from __future__ import annotations

from dmoe.config.expert_shapes import all_choices
from dmoe.config.schema import MoEConfig
from dmoe.explain.section import Section, count
from dmoe.explain.setting import Setting

GROUP = {
    "rank": "the tokens of one (virtual) rank in one micro-batch",
    "sequence": "the tokens of one sequence",
    "global": "the tokens of all ranks in one micro-batch",
}
PRIORITY = {
    "position": "all first choices before all second ones, then in token order",
    "score": "the higher router score first, ties in token order",
}


def describe(setting: Setting) -> Section | None:
    if setting.layer is None:
        return None
    slots, limits, moe = setting.slots(), setting.config.moe.capacity, setting.config.moe
    if slots.capacity is None:
        words = [
            "Dropless: an expert takes every token that chose it, so nothing is dropped and nothing padded."
        ]
        if moe.router.kind == "expert_choice":
            words = [
                f"None beside the router's own: an expert takes its fair share, {moe.top_k}/{moe.num_experts} of each group's tokens."
            ]
        return Section("capacity", "Capacity", words, {"factor": None, "slots": None})
    tokens = group_tokens(setting)
    fair = moe.top_k * tokens / all_choices(moe)
    total = slots.capacity * slots.groups * moe.num_experts
    words = [
        f"Group: {GROUP[limits.group]}; {count(slots.groups, 'group')} of {count(tokens, 'token')} "
        f"{'over all ranks' if limits.group == 'global' else 'in one forward of one process'}.",
        f"An expert has C = {count(slots.capacity, 'slot')} for a group: {_formula(moe, tokens)}. Its fair share is {fair:g} "
        f"choices, so it drops beyond {slots.capacity / fair:.4g} times that. All experts and groups: {total:,} slots.",
        f"Served first: {PRIORITY[limits.priority]}.",
        _after(moe),
    ]
    numbers = {
        "factor": limits.factor,
        "group": limits.group,
        "groups": slots.groups,
        "tokens_per_group": tokens,
        "slots": slots.capacity,
        "slots_total": total,
        "fair_share": fair,
        "load_over_fair_share": slots.capacity / fair,
    }
    return Section("capacity", "Capacity", words, numbers)


def group_tokens(setting: Setting) -> int:
    """T_g."""
    if setting.config.moe.capacity.group == "global":
        return setting.tokens * setting.world
    return setting.tokens // setting.slots().groups


def _formula(moe: MoEConfig, tokens: int) -> str:
    limits = moe.capacity
    wanted = f"ceil({limits.factor:g} x {moe.top_k} x {tokens} / {all_choices(moe)})"
    return f"{wanted}, at least {limits.min_capacity} and at most {tokens}"


def _after(moe: MoEConfig) -> str:
    limits = moe.capacity
    if limits.overflow == "next_choice":
        first = "A choice without a slot is offered once to the token's next eligible expert, and dropped if that is full too"
    else:
        first = "A choice without a slot is dropped"
    weights = "are divided by their sum" if limits.renormalize else "stay as they are"
    lost = "A token with nothing left passes on the residual stream alone."
    return f"{first}; the weights of a token's surviving choices {weights}. {lost}"
