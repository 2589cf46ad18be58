"""Likely causes of differences.

No diagnosis: bugs that users of similar systems reported (see docs/verify.md) leave typical
differences, and each is described here.
"""

from __future__ import annotations

from collections.abc import Callable

from dmoe.verify.cases import Case
from dmoe.verify.compare import Difference


def likely_cause(difference: Difference, case: Case) -> str:
    """Return a sentence on the usual cause of such a difference."""
    text = _CAUSES[difference.quantity]
    sentence = text if isinstance(text, str) else text(difference, case)
    return f"{_factor(difference, case)}{sentence}"


def _factor(difference: Difference, case: Case) -> str:
    """Describe a factor that the size of a process group explains, or that all gradients share."""
    ratio = difference.ratio
    if ratio is None or abs(ratio - 1) < 1e-6:
        return ""
    sizes = {"the world": case.world, "EP": case.ep, "EDP": case.world // case.ep}
    for name, size in sizes.items():
        if size > 1 and abs(ratio - size) < 1e-3 * size:
            return f"exactly {ratio:.4g} times too large, {name} is {size}: "
        if size > 1 and abs(ratio * size - 1) < 1e-3:
            return f"exactly {1 / ratio:.4g} times too small, {name} is {size}: "
    if difference.quantity.endswith("gradients"):
        return f"{ratio:.4g} times the expected value: "
    return ""


def _initial_weights(difference: Difference, case: Case) -> str:
    if ".experts." in difference.where:
        return (
            "experts start from weights that depend on the EP rank, or rank 0's were broadcast "
            "over all others (DDP does that)"
        )
    return "dense weights start from values that depend on the rank"


def _dropped_set(difference: Difference, case: Case) -> str:
    if difference.finding.startswith("same numbers"):
        return (
            "the same number was dropped but of other tokens: the order of the queue is not the "
            "documented one (an unordered race?)"
        )
    return "an expert keeps another number of assignments: capacity or groups are not the same"


def _counts(difference: Difference, case: Case) -> str:
    if case.recompute:
        return "choices are counted again when activations are recomputed"
    return "choices are counted after drops, twice, or not over all ranks"


def _loss(difference: Difference, case: Case) -> str:
    if _factor(difference, case):
        return "the loss is not divided by the number of targets of the global batch"
    return (
        "the experts' outputs are combined wrongly: weights applied twice or not at all, or rows "
        "returned to other tokens"
    )


def _router_gradient(difference: Difference, case: Case) -> str:
    if difference.finding == "all zero":
        return "the router gets no gradient at all: its weights are detached from the loss"
    return (
        "the router's weights are detached from the main loss, or their gradient is not summed "
        "over the ranks"
    )


def _expert_gradients(difference: Difference, case: Case) -> str:
    if difference.ratio is None:
        return (
            "gradients of different experts are mixed (experts inside DDP's average?), or rows "
            "are returned to the wrong tokens (a wrong inverse permutation)"
        )
    return (
        "expert gradients have a factor that dense ones do not (a division by EP, EDP or the "
        "world), or lack the sum over replicas"
    )


def _parameters(difference: Difference, case: Case) -> str:
    if ".experts." in difference.where:
        return (
            "experts diverge although their gradients agree: they are updated as replicas, or "
            "clipped differently"
        )
    return "the optimizer step differs although gradients, norm and clip agree"


_CAUSES: dict[str, str | Callable[[Difference, Case], str]] = {
    "initial weights": _initial_weights,
    "capacity slots": (
        "the capacity is computed from a number of tokens that depends on the rank or the world"
    ),
    "dropped set": _dropped_set,
    "counts": _counts,
    "loss": _loss,
    "auxiliary losses": "an auxiliary loss is scaled or averaged over the wrong groups of tokens",
    "router gradient": _router_gradient,
    "expert gradients": _expert_gradients,
    "dense gradients": (
        "the sum of dense gradients over the ranks is missing, repeated or averaged"
    ),
    "global norm": "the norm counts this rank's experts only, or some of them more than once",
    "clip coefficient": "the clip coefficient is computed from another norm than the global one",
    "bias": (
        "the router bias was updated from counts after drops, of one rank only, or more than once "
        "per step"
    ),
    "parameters after two steps": _parameters,
    "checkpoint written here, read by 1": (
        "a checkpoint of several ranks does not have every rank's experts or moments"
    ),
    "checkpoint written by 1, read here": (
        "loading does not give each rank its own experts or moments (resharding)"
    ),
    "every rank finishes": (
        "the ranks disagree on shapes, splits or the order of collectives, or one raised an error"
    ),
}
"""Sentence, or function that chooses one, by quantity."""
