"""A plan as one page of text, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dmoe.config.errors import ConfigError
from dmoe.report.format import format_count, format_duration, format_percent, plural
from dmoe.simulation.decision import Plan, beside_the_layout
from dmoe.simulation.search import Estimate

MAX_FAILED = 8
STATE = ("weights", "gradients", "moments", "copies", "activations")
"""Parts of the memory that the page has for both modes."""
PARTS = {
    "matrix": "matrix products",
    "attention": "attention",
    "memory": "other kernels (norms, activations, permutations, loss, optimizer)",
    "host": "waiting for the host to launch kernels",
    "exchange": "token exchange (all-to-all)",
    "gradients": "sums and gathers of parameters that nothing hides",
    "copies": "copies to the memory of the host and back",
}


def tokens_per_second(plan: Plan, estimate: Estimate) -> float:
    """Return the tokens per second of all ranks."""
    return plan.tokens_per_step / estimate.time.total


def utilization(plan: Plan, estimate: Estimate, precision: str) -> float:
    """Return MFU: the arithmetic that the model asks for over what the devices could do."""
    dtype = "float32" if precision == "fp32" else "bfloat16"
    peak = plan.cluster.flops(dtype) * plan.world
    return tokens_per_second(plan, estimate) * plan.flops_per_token / peak


def numbers(
    plan: Plan, precision: str, tokens: float | None, hourly_cost: float | None
) -> dict[str, Any]:
    """Return the plan as plain JSON."""
    best = [_estimate(plan, e, precision, tokens, hourly_cost) for e in plan.best]
    given = (
        {"error": str(plan.given)}
        if isinstance(plan.given, ConfigError)
        else _estimate(plan, plan.given, precision, tokens, hourly_cost)
    )
    nearest = plan.nearest and _estimate(plan, plan.nearest, precision, tokens, hourly_cost)
    return {
        "world": plan.world,
        "cluster": plan.cluster.name,
        "bytes_per_rank": plan.usable,
        "vocabulary": plan.vocabulary,
        "load": {"source": plan.load.source},
        "given": given,
        "best": best,
        "nearest": nearest,
        "failed": [{"layout": layout, "why": why} for layout, why in plan.failed],
        "options": [asdict(option) | {"pays": option.pays} for option in plan.options],
    }


def _estimate(
    plan: Plan, estimate: Estimate, precision: str, tokens: float | None, hourly_cost: float | None
) -> dict[str, Any]:
    speed = tokens_per_second(plan, estimate)
    shape = estimate.layout.shape
    drops = plan.load.drop_rate(*shape)
    found: dict[str, Any] = {
        "layout": estimate.layout._asdict() | {"accumulation": estimate.accumulation},
        "fits": estimate.fits,
        "memory": asdict(estimate.memory)
        | {"peak_at": estimate.peak_at, "exchange_at": estimate.rows_at}
        | {"activations_by_recompute": estimate.kept_at}
        | {"other_mode": {m: asdict(u) for m, u in (estimate.other_mode or {}).items()}}
        | {"reserved": plan.cluster.reserved},
        "busiest_rank": {
            "mean": plan.load.mean_max(*shape),
            "p99": plan.load.p99(*shape),
            "worst": plan.load.worst(estimate.layout.ep),
        },
        "drop_rate": drops,
        "sent_at": estimate.sent_at,
        "seconds_per_step": asdict(estimate.time) | {"total": estimate.time.total},
        "error": plan.cluster.error,
        "tokens_per_second": speed,
        "tokens_per_second_without_dropped": speed * (1 - drops),
        "mfu": utilization(plan, estimate, precision),
    }
    if tokens:
        found["days"] = tokens / speed / 86400
        if hourly_cost is not None:
            found["cost"] = hourly_cost * plan.world * tokens / speed / 3600
    return found


def page(plan: Plan, precision: str, tokens: float | None, hourly_cost: float | None) -> list[str]:
    """Return the plan as lines: the answer first, then why, then what fails."""
    head = f"{plural(plan.world, 'rank')} of {plan.cluster.name}, {precision}"
    head += f", router load {plan.load.source}"
    lines = [head, f"  room for tensors: {_gb(plan.usable)} per rank; {_vocabulary(plan)}", ""]
    lines += _given(plan)
    if not plan.best:
        assert plan.nearest is not None
        least = plan.nearest
        lines += [
            f"No layout fits. Nearest: {least.layout.fields()}",
            f"  needs {_gb(_p99(least))} of {_gb(plan.usable)} per rank: use more ranks "
            "(--ranks), devices with more memory, or a shorter data.seq_len.",
        ]
        if least.memory.whole_gradients > 0.2 * least.memory.peak:
            batch = plan.world * least.layout.micro_batch
            lines.append(
                f"  With one micro-batch per step (train.global_batch={batch} x "
                "parallel.virtual_ranks) gradients would stay sharded."
            )
        lines += ["", *_memory(plan, least)]
    for place, estimate in enumerate(plan.best, 1):
        lines += ["", f"{place}. {estimate.layout.fields()}"]
        lines += _numbers(plan, estimate, precision, tokens, hourly_cost)
        if place == 1:
            lines += _why(plan, estimate)
            lines += ["", *_memory(plan, estimate), "", *_time(plan, estimate)]
            lines += ["", *_imbalance(plan, estimate)]
    if plan.best:
        lines += ["", *beside_the_layout(plan.options, plan.load)]
    if plan.failed:
        lines += ["", "Left out"]
        lines += [f"  {layout}: {why}" for layout, why in plan.failed[:MAX_FAILED]]
        if len(plan.failed) > MAX_FAILED:
            lines.append(f"  and {len(plan.failed) - MAX_FAILED} more (--json has all)")
    return lines


def _vocabulary(plan: Plan) -> str:
    return f"vocabulary {plan.vocabulary:,} (--vocabulary for another)"


def _given(plan: Plan) -> list[str]:
    if isinstance(plan.given, ConfigError):
        return [f"The config as it is cannot run there: {plan.given}"]
    given = plan.given
    if given.fits:
        if plan.best and given.layout == plan.best[0].layout:
            return [f"The config as it is fits, and is the fastest layout found: {_speed(given)}."]
        return [f"The config as it is fits ({_gb(_p99(given))}) and takes {_speed(given)}."]
    answer = f"The config as it is does not fit: {_gb(_p99(given))} of {_gb(plan.usable)} per rank"
    if plan.best:
        closest = min(plan.best, key=lambda e: _distance(e, given))
        answer += f". Nearest that fits: {closest.layout.fields()}"
    return [answer + "."]


def _distance(estimate: Estimate, given: Estimate) -> int:
    return sum(a != b for a, b in zip(estimate.layout, given.layout, strict=True))


def _speed(estimate: Estimate) -> str:
    return f"{format_duration(estimate.time.total)} per step"


def _p99(estimate: Estimate) -> int:
    assert estimate.peak_at is not None
    return estimate.peak_at["p99"]


def _numbers(
    plan: Plan, estimate: Estimate, precision: str, tokens: float | None, hourly_cost: float | None
) -> list[str]:
    found = _estimate(plan, estimate, precision, tokens, hourly_cost)
    speed, error = found["tokens_per_second"], plan.cluster.error
    low, high = estimate.time.total * (1 - error), estimate.time.total * (1 + error)
    dropped = ""
    if found["drop_rate"]:
        kept = found["tokens_per_second_without_dropped"]
        dropped = f", {format_count(kept)} without what is dropped"
    lines = [
        f"   {_speed(estimate)} ({format_duration(low)} to {format_duration(high)}): "
        f"{format_count(speed)} tokens/s, {format_count(speed / plan.world)} per rank{dropped}; "
        f"MFU {format_percent(found['mfu'])}; {_gb(_p99(estimate))} per rank; "
        f"{plural(estimate.accumulation, 'accumulation step')}"
    ]
    if tokens:
        days = found["days"]
        cost = ""
        if "cost" in found:
            cost = f", {found['cost']:,.0f} at {hourly_cost:g} per rank and hour"
        lines.append(
            f"   {format_count(tokens)} tokens: {days:,.1f} days "
            f"({days * (1 - error):,.1f} to {days * (1 + error):,.1f}){cost}"
        )
    return lines


def _why(plan: Plan, best: Estimate) -> list[str]:
    reasons = [reason] if (reason := _why_ep(plan, best)) else []
    if best.layout.mode == "fsdp":
        reasons.append("fsdp shards what all ranks hold in common")
    largest = max(PARTS, key=lambda part: getattr(best.time, part))
    reasons.append(f"most time goes into {PARTS[largest]} ({_share(best, largest)})")
    return [f"   Why: {'; '.join(reasons)}."]


def _why_ep(plan: Plan, best: Estimate) -> str:
    """Compare with the fastest layout of the other kind: without EP, or with it."""
    ep = best.layout.ep
    others = [e.time.total for e in plan.fitting if (e.layout.ep == 1) != (ep == 1)]
    longer = f"takes about {max(0, min(others) / best.time.total - 1):.0%} longer" if others else ""
    if ep == 1:
        fastest = "do not use EP here: every rank has room for all experts, and the fastest step"
        return f"{fastest} with EP {longer}" if others else ""
    exchanged = f"{_share(best, 'exchange')} of the step is token exchange"
    if others:
        return f"EP {ep}: {exchanged}, and the fastest step without EP {longer}"
    if any("parallel.ep=1 " in layout for layout, _ in plan.failed):
        return f"EP {ep} divides the experts, of which one rank alone cannot hold all; {exchanged}"
    return f"EP {ep}: {exchanged}"


def _share(estimate: Estimate, part: str) -> str:
    return format_percent(round(getattr(estimate.time, part) / estimate.time.total, 2))


def _memory(plan: Plan, estimate: Estimate) -> list[str]:
    used, peaks = estimate.memory, estimate.peak_at or {}
    rows: list[tuple[str, float]] = [
        ("weights", used.weights),
        ("gradients", used.gradients),
        ("moments of the optimizer", used.moments),
    ]
    if used.host_moments:
        rows[-1] = ("moments of the optimizer: on the host, not in the sums", used.host_moments)
    if used.copies:
        rows.append(("working copies of weights: cast, or gathered by fsdp", used.copies))
    name = "activations kept for the backward of a micro-batch"
    if kept := estimate.kept_at:
        name += f"; by train.recompute: {_by_load(kept)}"
    rows.append((name, used.activations))
    if used.host_activations:
        rows.append(("those on the host, not in the sums", used.host_activations))
    if used.whole_gradients > 1.01 * used.gradients:
        name = "gradients, not sharded while micro-batches are accumulated"
        rows.insert(2, (name, used.whole_gradients))
    if used.logits:
        rows.append(("logits, and what else the loss takes at one time", used.logits))
    if by_load := estimate.rows_at:
        name = "rows that a layer sends and receives; by load: "
        rows.append((name + _by_load(by_load), by_load["p99"]))
    rows.append(("kept free: context, libraries, communicators", plan.cluster.reserved))
    lines = ["   Memory of a rank", *(f"     {_gb(size):>10}  {name}" for name, size in rows)]
    lines.append(
        f"     {_gb(used.peak):>10}  most at one time, in {used.peak_stage}; "
        f"by load: {_by_load(peaks)}"
    )
    for mode, other in (estimate.other_mode or {}).items():
        parts = {name: getattr(other, name) for name in STATE if getattr(other, name)}
        fits = "" if other.peak <= plan.usable else ", which does not fit"
        lines.append(f"     {_gb(other.peak):>10}  with {mode}{fits}: {_by_load(parts)}")
    return lines


def _by_load(sizes: dict[str, int]) -> str:
    return ", ".join(f"{_gb(size)} {name}" for name, size in sizes.items())


def _time(plan: Plan, estimate: Estimate) -> list[str]:
    lines = ["   Time of a step"]
    for part, words in PARTS.items():
        seconds = getattr(estimate.time, part)
        if part == "copies":
            words += f", at {_gb(plan.cluster.host_bandwidth)}/s in each direction"
            if "host_bandwidth" not in plan.cluster.sources:
                words += ": assumed, since the cluster file has no host_bandwidth"
        if seconds > 0.001 * estimate.time.total:
            lines.append(f"     {format_duration(seconds):>10}  {words}")
    return lines


def _imbalance(plan: Plan, estimate: Estimate) -> list[str]:
    load, shape = plan.load, estimate.layout.shape
    if estimate.layout.ep == 1:
        return ["   Imbalance: none between ranks, since each has all experts."]
    ranks = f"{load.mean_max(*shape):.3g} mean, {load.p99(*shape):.3g} p99"
    lines = [
        "   Imbalance of the EP ranks",
        f"     rows of the busiest over those of a balanced router: {ranks}, "
        f"{load.worst(estimate.layout.ep):.3g} worst",
    ]
    if sent := estimate.sent_at:
        lines.append(f"     token exchange, sent by that rank per step: {_by_load(sent)}")
    if drops := load.drop_rate(*shape):
        lines.append(f"     {format_percent(drops)} of the assignments dropped")
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
