"""A difference -> its likeliest cause in words.

Not a diagnosis: the bugs that the peers' users reported for years (shared knowledge, see docs/verify.md) each leave a mark, and here
the marks are named.
"""

from __future__ import annotations

from collections.abc import Callable

from dmoe.verify.cases import Case
from dmoe.verify.compare import Difference


def cause(difference: Difference, case: Case) -> str:
    """One sentence on what usually makes `difference.quantity` go wrong in this way."""
    factor = _factor(difference, case)
    reasons: dict[str, Callable[[Difference, Case], str]] = {
        "initial weights": _initial,
        "capacity slots": lambda d, c: (
            "the capacity is computed from a number of tokens that depends on the rank or the world"
        ),
        "dropped set": _dropped,
        "counts": _counts,
        "loss": _loss,
        "auxiliary losses": lambda d, c: (
            "an auxiliary loss is scaled or averaged over the wrong units"
        ),
        "router gradient": _router,
        "expert gradients": _experts,
        "dense gradients": lambda d, c: (
            "the sum of dense gradients over the ranks is missing, repeated or averaged"
        ),
        "global norm": lambda d, c: (
            "the norm counts this rank's experts only, or some of them more than once"
        ),
        "clip coefficient": lambda d, c: (
            "the clip coefficient is computed from another norm than the global one"
        ),
        "bias": lambda d, c: (
            "the router bias was updated from counts after drops, of one rank only, or more than once a step"
        ),
        "parameters after two steps": _parameters,
        "checkpoint written here, read by 1": lambda d, c: (
            "a checkpoint of several ranks does not hold every rank's experts or moments"
        ),
        "checkpoint written by 1, read here": lambda d, c: (
            "loading does not give each rank its own experts or moments (resharding)"
        ),
        "every rank finishes": lambda d, c: (
            "the ranks disagree on shapes, splits or the order of collectives, or one raised an error"
        ),
    }
    return f"{factor}{reasons[difference.quantity](difference, case)}"


def _factor(difference: Difference, case: Case) -> str:
    """The factor in words, where it is one that a parallel run could have put there, or explains a whole tensor."""
    ratio = difference.ratio
    if ratio is None or abs(ratio - 1) < 1e-6:
        return ""
    names = {"the world": case.world, "EP": case.ep, "EDP": case.world // case.ep}
    for name, value in names.items():
        if value > 1 and abs(ratio - value) < 1e-3 * value:
            return f"exactly {ratio:.4g} times too large, {name} is {value}: "
        if value > 1 and abs(ratio * value - 1) < 1e-3:
            return f"exactly {1 / ratio:.4g} times too small, {name} is {value}: "
    return (
        f"{ratio:.4g} times what it should be: "
        if difference.quantity.endswith("gradients")
        else ""
    )


def _initial(difference: Difference, case: Case) -> str:
    if ".experts." in difference.where:
        return "experts start from weights that depend on the EP rank, or rank 0's were broadcast over all others (DDP does that)"
    return "dense weights start from values that depend on the rank"


def _dropped(difference: Difference, case: Case) -> str:
    if difference.finding.startswith("same numbers"):
        return "the same number was dropped but of other tokens: the order of the queue is not the documented one (an unordered race?)"
    return "an expert keeps another number of assignments: capacity or groups are not the same"


def _counts(difference: Difference, case: Case) -> str:
    if case.recompute:
        return "choices are counted again when activations are recomputed"
    return "choices are counted after drops, twice, or not over all ranks"


def _loss(difference: Difference, case: Case) -> str:
    if _factor(difference, case):
        return "the loss is not divided by the number of targets of the global batch"
    return "the experts' outputs are combined wrongly: weights applied twice or not at all, or rows returned to other tokens"


def _router(difference: Difference, case: Case) -> str:
    if difference.finding == "all zero":
        return "the router gets no gradient at all: its weights are detached from the loss"
    return "the router's weights are detached from the main loss, or their gradient is not summed over the ranks"


def _experts(difference: Difference, case: Case) -> str:
    if difference.ratio is None:
        return (
            "gradients of different experts are mixed (experts inside DDP's average?), or rows are given back to the wrong "
            "tokens (a wrong inverse permutation)"
        )
    return "expert gradients carry a factor that dense ones do not (a division by EP, EDP or the world), or miss the sum over copies"


def _parameters(difference: Difference, case: Case) -> str:
    if ".experts." in difference.where:
        return "experts drift apart although their gradients agree: they are updated as replicas, or clipped differently"
    return "the optimizer step differs although gradients, norm and clip agree"
