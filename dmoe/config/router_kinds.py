"""One row per router kind: what each kind reads, needs and promises. Imports no torch.

Everything that depends on the kind of a router asks its row here instead of comparing strings, so
a new kind is one row, one file in `dmoe/moe/routers/`, one naive twin in
`dmoe/verify/naive/routing.py` and one test case in `tests/moe/routers/cases.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmoe.config.plugin_loader import loaded_class
from dmoe.config.plugins import label

_SCORED = frozenset({"jitter", "freeze"})
_OWN = _SCORED | {"score", "weights_from"}
"""Fields that `LearnedRouter` reads for the routers derived from it."""


@dataclass(frozen=True)
class RouterSpec:
    """Properties of every router of one kind. The defaults are those of plain top-k routing."""

    choice: str
    """Phrase for the sentence `each token goes to <choice>`."""
    reads: frozenset[str] = _SCORED
    """Fields of `moe.router` that this kind reads and some other kinds do not."""
    learned: bool = True
    """A trained gate gives logits and scores. False: a fixed rule, with equal weights."""
    ranks_experts: bool = True
    """A token's experts are sorted by score + bias: there is a next choice, and a bias can move
    choices."""
    ordered_choices: bool = True
    """The K choices of a token are in order of preference, so that it has a first one."""
    variable_k: bool = False
    """Tokens take different numbers of experts; `moe.top_k` is the maximum."""
    normalizable: bool = False
    """`renormalize` and `weights_from` decide if a token's weights sum to `scale`."""
    weights_sum_to_scale: bool = False
    """A token's weights sum to `scale`, whatever the config says."""
    all_experts: bool = False
    """Every token goes to every expert; `moe.top_k` must be the number of experts."""
    zero_cost_experts: bool = False
    """Zero-cost experts can be among the choices."""
    has_noise: bool = False
    """Training adds learned noise to the logits (needed by `balance.load`)."""
    has_budget: bool = False
    """A token has a compute budget, which a call may set."""
    needs: str | None = None
    """The field of `TokenContext` that the router cannot do without."""
    can_choose_none: bool = False
    """A token can have no expert at all, before any capacity."""
    looks_ahead: bool = False
    """The choice for a token depends on later tokens of its sequence."""
    replayable: bool = False
    """The weights of given experts are `combine_weights` of their logits, so that recorded choices
    can be trained with."""


ROUTERS: dict[str, RouterSpec] = {
    "top_k": RouterSpec(
        "the experts of largest score",
        _SCORED | {"score", "weights_from"},
        normalizable=True,
        zero_cost_experts=True,
        replayable=True,
    ),
    "noisy": RouterSpec(
        "the experts of largest score, with noise of a learned width in training",
        weights_sum_to_scale=True,
        zero_cost_experts=True,
        has_noise=True,
        replayable=True,
    ),
    "group_limited": RouterSpec(
        "the experts of largest score within a token's best groups of experts",
        _SCORED | {"score", "weights_from", "groups", "topk_groups"},
        normalizable=True,
        replayable=True,
    ),
    "adaptive": RouterSpec(
        "as many experts as it takes for their probabilities to reach moe.router.top_p",
        _SCORED | {"weights_from", "top_p", "k_min"},
        variable_k=True,
        zero_cost_experts=True,
        replayable=True,
    ),
    "fixed": RouterSpec(
        "the experts that belong to the token's label; nothing is learned",
        frozenset(),
        learned=False,
        ranks_experts=False,
        weights_sum_to_scale=True,
        needs="label_T",
    ),
    "hash": RouterSpec(
        "the experts that a hash of the token gives; nothing is learned",
        frozenset(),
        learned=False,
        ranks_experts=False,
        weights_sum_to_scale=True,
        needs="token_id_T",
    ),
    "soft": RouterSpec(
        "all experts",
        ranks_experts=False,
        ordered_choices=False,
        all_experts=True,
        weights_sum_to_scale=True,
    ),
    "expert_choice": RouterSpec(
        "the experts that take it: each expert takes the tokens that score it highest",
        _SCORED | {"allow_future_leak"},
        ranks_experts=False,
        ordered_choices=False,
        looks_ahead=True,
        can_choose_none=True,
    ),
    "workload": RouterSpec(
        "the experts of a synthetic workload, forced; nothing is learned",
        frozenset({"workload", "ranks", "hot"}),
        learned=False,
        ranks_experts=False,
        weights_sum_to_scale=True,
        can_choose_none=True,
    ),
    "budget": RouterSpec(
        "by descending score, the experts that weigh more than moe.router.min_weight and fit the "
        "budget of moe.router.budget",
        _SCORED | {"min_weight", "budget", "per", "allow_future_leak"},
        variable_k=True,
        zero_cost_experts=True,
        has_budget=True,
        can_choose_none=True,
    ),
}


WORKLOADS = {
    "W0": "balanced: every expert alike",
    "W1": "hot set: experts of any rank",
    "W2": "hot rank: the experts of one rank",
    "W3": "spread hot: experts of as many ranks as can be",
    "W4": "ragged sources: sequences send from 1 / ranks to all of their tokens",
    "W5": "empty rank: no token for the experts of one rank",
    "W6": "rotating hot spot: W2, of the next rank every 3 steps",
    "W7": "burst: W2 in one step of 5, W0 in the others",
}
"""Values of `moe.router.workload` and their names; `dmoe/moe/routers/workload.py` defines them."""


def router_spec(kind: str) -> RouterSpec:
    """Return the row of a kind; of a router of the user's own, what its class says in `spec`.

    Of one that is not loaded (a report on a run), the defaults.
    """
    if kind in ROUTERS:
        return ROUTERS[kind]
    own = loaded_class(kind)
    spec = getattr(own, "spec", None)
    if isinstance(spec, RouterSpec):
        return spec
    return RouterSpec(f"those that {label(kind)} chooses", _OWN)


def kinds_where(**wanted: object) -> tuple[str, ...]:
    """Return the kinds whose rows have these values, e.g. `kinds_where(learned=False)`."""
    return tuple(
        kind
        for kind, spec in ROUTERS.items()
        if all(getattr(spec, name) == value for name, value in wanted.items())
    )


def kinds_that_read(field: str) -> tuple[str, ...]:
    """Return the kinds that read `moe.router.<field>`."""
    return tuple(kind for kind, spec in ROUTERS.items() if field in spec.reads)
