"""Choice, weights and balance of the experts, and settings outside of usual ranges.

Letters: E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

from dmoe.config.recommended import out_of_range
from dmoe.config.router_kinds import ROUTERS
from dmoe.explain.setting import Section, Setting
from dmoe.report.sentences import aux_coefficients, balance_sentences, routing_sentences

KIND_FIELDS = ("groups", "topk_groups", "top_p", "k_min", "min_weight", "budget", "per")
"""Fields of `moe.router` that are reported if the router's kind reads them."""


def explain_routing(setting: Setting) -> Section | None:
    """Explain score, choice, weights and noise; None for a dense model."""
    if setting.layer is None:
        return None
    moe = setting.config.moe
    reads = ROUTERS[moe.router.kind].reads
    numbers: dict[str, Any] = {
        "kind": moe.router.kind,
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "scale": moe.router.scale,
    }
    numbers |= {name: getattr(moe.router, name) for name in KIND_FIELDS if name in reads}
    if "k_min" in reads:
        numbers["k_max"] = moe.top_k
    return Section("routing", "Routing", routing_sentences(setting.config), numbers)


def explain_balance(setting: Setting) -> Section | None:
    """Explain auxiliary losses and bias; None for a dense model."""
    if setting.layer is None:
        return None
    balance = setting.config.moe.balance
    numbers: dict[str, Any] = {
        "coefficients": aux_coefficients(balance),
        "switch_level": balance.switch_level,
        "bias_rate": balance.bias,
    }
    return Section("balance", "Balance", balance_sentences(setting.config.moe), numbers)


def explain_recommended(setting: Setting) -> Section | None:
    """List settings outside of the ranges in the literature; None if there is none."""
    remarks = out_of_range(setting.config) if setting.layer is not None else []
    if not remarks:
        return None
    numbers = {
        remark.field: {
            "value": remark.value,
            "low": remark.range.low,
            "high": remark.range.high,
            "source": remark.range.source,
        }
        for remark in remarks
    }
    sentences = [str(remark) for remark in remarks]
    return Section("recommended", "Outside of recommended ranges", sentences, numbers)
