"""The report: one row per quantity, and the likely cause of each difference.

No diagnosis: bugs that users of similar systems reported (see docs/verify.md) leave typical
differences, and each is described here with the package where its code is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmoe.verify.cases import Case
from dmoe.verify.differences import AFTER_ADAM, Difference, tolerance

Finding = tuple[Case, Difference]


@dataclass(frozen=True)
class Row:
    """Largest difference of one quantity over all cases."""

    quantity: str
    ok: bool
    size: float
    """Relative difference; for exact quantities the number of entries that differ."""
    tolerance: float
    case: str
    where: str
    cause: str
    follows: bool = False
    """Explained by another difference in every case where it differs."""


@dataclass(frozen=True)
class Report:
    """Result of `verify`."""

    rows: list[Row]
    cases: list[str]
    refused: dict[str, str]
    undecided: dict[str, str]
    """Float32 only: cases with a tie, and its description. Quantities that follow are in no row."""
    dtype: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Return True if no quantity differs."""
        return all(row.ok for row in self.rows)

    @property
    def first(self) -> Row | None:
        """Return the first difference that follows from no other."""
        return min(
            (row for row in self.rows if not row.ok), key=lambda row: row.follows, default=None
        )


def make_row(quantity: str, found: list[Finding], dtype: str) -> Row | None:
    """Return the row of a quantity: its largest difference that follows from no other, if any."""
    own = [(case, difference) for case, difference in found if difference.quantity == quantity]
    if not own:
        return None

    def rank(pair: Finding) -> tuple[bool, bool, int, float]:
        red = pair[1].is_red(dtype)
        return red, red and not pair[1].follows, -pair[1].step, pair[1].size

    case, worst = max(own, key=rank)
    allowed = 0.0 if worst.exact else tolerance(quantity, dtype, worst.step)
    if not worst.is_red(dtype):
        return Row(quantity, True, worst.size, allowed, str(case), "", "")
    where = ", ".join(part for part in (worst.where, worst.finding) if part)
    cause = likely_cause(worst, case)
    return Row(quantity, False, worst.size, allowed, str(case), where, cause, worst.follows)


def likely_cause(difference: Difference, case: Case) -> str:
    """Return a sentence on the usual cause of such a difference."""
    if difference.follows:
        return "follows from another difference"
    text = _CAUSES[difference.quantity]
    sentence = text if isinstance(text, str) else text(difference, case)
    return f"{_step(difference)}{_factor(difference, case)}{sentence}"


def _step(difference: Difference) -> str:
    last = difference.quantity in AFTER_ADAM
    if difference.step == 0 or last:
        return ""
    return "the first step agrees, so something is kept from it that should not be: "


def _factor(difference: Difference, case: Case) -> str:
    """Describe a factor that the size of a process group explains, or that all gradients share."""
    ratio = difference.ratio
    if ratio is None or abs(ratio - 1) < 1e-6 or difference.exact:
        return ""
    sizes = {"the world": case.world, "EP": case.ep, "EDP": case.world // case.ep}
    for name, size in sizes.items():
        if size > 1 and abs(ratio - size) < 1e-3 * size:
            return f"exactly {ratio:.4g} times too large, {name} is {size}: "
        if size > 1 and abs(ratio * size - 1) < 1e-3:
            return f"exactly {1 / ratio:.4g} times too small, {name} is {size}: "
    if "gradient" in difference.quantity or "loss" in difference.quantity:
        return f"{ratio:.4g} times the expected value: "
    return ""


def _initial_weights(difference: Difference, case: Case) -> str:
    if ".experts." in difference.where:
        return (
            "experts start from weights that depend on the EP rank, or rank 0's were broadcast "
            "over all others (DDP does that)"
        )
    return "dense weights start from values that depend on the rank"


def _layer_inputs(difference: Difference, case: Case) -> str:
    return (
        "the blocks before the layer: embedding, attention and its rotary positions, norms, dense "
        "feed-forwards, or the residual sum (dmoe/models)"
    )


def _chosen(difference: Difference, case: Case) -> str:
    if case.tied:
        return (
            "experts of equal score are not taken in the order of their ids, or the score is "
            "rounded before the choice (dmoe/moe/routers)"
        )
    return (
        "the choice of experts by score and bias: number of experts, order, groups, limits or the "
        "bias (dmoe/moe/routers)"
    )


def _dropped_set(difference: Difference, case: Case) -> str:
    if difference.finding.startswith("same numbers"):
        return (
            "the same number was dropped but of other tokens: the order of the queue is not the "
            "documented one (an unordered race?)"
        )
    return (
        "an expert keeps another number of assignments: capacity, groups, positions in the queue "
        "or rerouting are not the documented ones (dmoe/moe/capacity.py, expert_queue.py)"
    )


def _counts(difference: Difference, case: Case) -> str:
    if case.recompute:
        return "choices are counted again when activations are recomputed"
    return (
        "choices are counted after drops, twice, in too small a number format, or not over all "
        "ranks and accumulation steps (dmoe/moe/metrics.py, dmoe/train/reduction.py)"
    )


def _loss(difference: Difference, case: Case) -> str:
    return (
        "the layers agree: the output projection, the last norm, the cross-entropy, or its sum "
        "over targets, accumulation steps and ranks"
    )


def _auxiliary(difference: Difference, case: Case) -> str:
    return (
        "an auxiliary loss is scaled or averaged over the wrong groups of tokens, has another "
        "formula, or counts other accumulation steps (dmoe/moe/load_balancing)"
    )


def _router_gradient(difference: Difference, case: Case) -> str:
    if difference.finding == "all zero":
        return "the router gets no gradient at all: its weights are detached from the loss"
    if difference.finding.startswith("auxiliary"):
        return (
            f"the {difference.finding}: their coefficient, or their division by the accumulation "
            "steps or the ranks"
        )
    return (
        "the router's weights are detached from the main loss, or the gradient of the combine "
        "weights is wrong, or its sum over the ranks"
    )


def _expert_gradients(difference: Difference, case: Case) -> str:
    if difference.ratio is None:
        return (
            "gradients of different experts are mixed (experts inside DDP's average?), the "
            "experts' or the combination's backward is wrong, rows are returned to the wrong "
            "tokens (a wrong inverse permutation), or a sum over replicas or accumulation steps "
            "is missing"
        )
    return (
        "expert gradients have a factor that dense ones do not (a division by EP, EDP or the "
        "world), or lack the sum over replicas"
    )


def _checkpoint(difference: Difference, case: Case) -> str:
    if difference.finding == "refused":
        return "reading refused the checkpoint: its files, or its tensors' names and shapes"
    if difference.finding.startswith("raised"):
        return "writing or reading raised an error at the place given, on any number of ranks"
    return (
        "a checkpoint of several ranks does not have every rank's experts or moments, or reading "
        "does not give each rank its own (resharding), or not all of the state"
    )


def _parameters(difference: Difference, case: Case) -> str:
    if difference.finding.startswith("a multiple"):
        return "weight decay: its size, or which parameters have it (build_optimizer)"
    if difference.finding.startswith("the update is"):
        return f"{difference.finding} as large: the learning rate, or Adam's bias correction"
    if ".experts." in difference.where:
        return (
            "experts diverge although their gradients agree: they are updated as replicas, or "
            "clipped differently, or a matrix of an expert stayed when it moved"
        )
    return "the optimizer step differs although gradients, norm and clip agree"


_CAUSES: dict[str, str | Callable[[Difference, Case], str]] = {
    "initial weights": _initial_weights,
    "initial draws": "two tensors are drawn from generators with the same key (initialize)",
    "samples": (
        "a rank trains on other samples than its share of the global batch (training_batches)"
    ),
    "module outputs": (
        "the modules at one target: their routing, their formula, their aggregation or the sum "
        "with the target's output (dmoe/modular); or what the target reads"
    ),
    "layer inputs": _layer_inputs,
    "router scores": (
        "the router's logits, noise or gate: another input, a missing or wrongly keyed noise, "
        "another precision (dmoe/moe/routers)"
    ),
    "capacity slots": (
        "the capacity is computed from a number of tokens that depends on the rank or the world, "
        "or by another formula"
    ),
    "chosen experts": _chosen,
    "dropped set": _dropped_set,
    "combine weights": (
        "the weights of the kept choices: score, renormalization, scale, or those of dropped and "
        "rerouted choices (dmoe/moe/routers, capacity.py)"
    ),
    "layer outputs": (
        "the experts' outputs are combined wrongly: weights applied twice or not at all, rows "
        "returned to other tokens, another expert's weights, a wrong activation, or shared and "
        "zero-cost experts (dmoe/moe/dispatch.py, experts, dmoe/distributed/all_to_all.py)"
    ),
    "counts": _counts,
    "loss": _loss,
    "auxiliary losses": _auxiliary,
    "output gradients": (
        "the gradient that reaches the layer: the loss's scale or its share of the global batch, "
        "or the backward of what follows the layer (dmoe/models, dmoe/train/step.py)"
    ),
    "expert gradients": _expert_gradients,
    "router gradient": _router_gradient,
    "input gradients": (
        "the layer's backward to its input: the dispatch's sum over choices, the all-to-all, the "
        "router's input, shared and zero-cost experts"
    ),
    "dense gradients": (
        "the sum of dense gradients over the ranks or accumulation steps is missing, repeated or "
        "averaged, or the backward of a norm, of attention or of the embedding is wrong"
    ),
    "global norm": "the norm counts this rank's experts only, or some of them more than once",
    "clip coefficient": "the clip coefficient is computed from another norm than the global one",
    "learning rate": "the schedule gives another learning rate, or the step's is not set",
    "bias": (
        "the router bias was updated from counts after drops, of one rank only, more than once "
        "per step, with another rate or sign, or not recentered"
    ),
    "moments": (
        "Adam's decay rates, or moments of gradients before clipping, of another parameter, or "
        "skipped for some, or left behind when an expert moved"
    ),
    "parameters after two steps": _parameters,
    "evaluation": (
        "the training agrees: what differs in evaluation (noise, capacity), which held-out samples "
        "each rank reads, padding, the sums over ranks, or an evaluation that changes the state "
        "(dmoe/train/evaluation/__init__.py, dmoe/distributed/data_parallel.py)"
    ),
    "float32 under bf16": (
        "parameters, moments or biases are kept in bf16: updates smaller than 1/256 are lost"
    ),
    "checkpoint written here, read by 1": _checkpoint,
    "checkpoint written by 1, read here": _checkpoint,
    "every rank finishes": (
        "one raised an error, at the place given, or the ranks disagree on shapes, splits or the "
        "order of collectives"
    ),
}
"""Sentence, or function that chooses one, by quantity."""
