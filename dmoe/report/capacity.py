"""Expert capacity in words: slots, groups, pools, priority and overflow."""

from __future__ import annotations

from dmoe.config.router_kinds import router_spec
from dmoe.config.schema import CapacityConfig, MoEConfig

GROUP = {
    "rank": "the tokens of one (virtual) rank in one micro-batch",
    "sequence": "the tokens of one sequence",
    "global": "the tokens of all ranks in one micro-batch",
}
PRIORITY = {
    "position": "all first choices before all second choices, then in token order",
    "score": "the higher router score first; ties in token order",
}


def capacity_sentences(moe: MoEConfig) -> list[str]:
    """Describe the capacity policy, in training and in evaluation."""
    capacity = moe.capacity
    if capacity.factor is None:
        return [dropless_sentence(moe)]
    evaluation = "dropless" if capacity.eval_factor is None else f"factor {capacity.eval_factor:g}"
    return [
        f"Capacity: {'a pool' if capacity.pool > 1 else 'an expert'} takes at most "
        f"{capacity.factor:g} times its fair share of a group; a group is {GROUP[capacity.group]}. "
        f"In evaluation: {evaluation}.",
        *pool_sentences(capacity),
        *overflow_sentences(capacity),
    ]


def pool_sentences(capacity: CapacityConfig) -> list[str]:
    """Describe which slots are shared; empty if none are."""
    if capacity.pool == 1:
        return []
    share = "" if capacity.pool_floor == 1 else f"{capacity.pool_floor:.4g} of "
    return [
        f"Pools: {capacity.pool} consecutive experts share their slots of a group. An expert has "
        f"{share}its own slots for itself, and takes what its pool leaves empty."
    ]


def dropless_sentence(moe: MoEConfig) -> str:
    """Describe routing without a capacity factor."""
    if router_spec(moe.router.kind).looks_ahead:  # experts choose among a sequence's tokens
        return f"Capacity: an expert takes {moe.top_k}/{moe.num_experts} of each group's tokens."
    return "Capacity: dropless; an expert takes every token that chose it, without padding."


def overflow_sentences(capacity: CapacityConfig) -> list[str]:
    """Describe which assignments get the slots, and what happens to the others."""
    overflow = "an assignment without a slot is dropped"
    if capacity.overflow == "next_choice":
        full = "the pool of that" if capacity.pool > 1 else "that"
        overflow = (
            "an assignment without a slot is offered once to the token's next eligible expert, and "
            f"dropped if {full} is full too"
        )
    weights = "divided by their sum" if capacity.renormalize else "not changed"
    return [
        f"Priority: {PRIORITY[capacity.priority]}.",
        f"Overflow: {overflow}. The weights of a token's other assignments are {weights}. A token "
        "without any expert keeps only the residual stream.",
    ]
