"""What keeps the experts in use, and how strongly."""

from __future__ import annotations

from typing import Any

from dmoe.config.schema import BalanceConfig
from dmoe.explain.section import Section
from dmoe.explain.setting import Setting

LEVEL = {
    "sequence": "over each sequence, then averaged",
    "micro_batch": "over each (virtual) rank's micro-batch, then averaged",
    "global": "over the micro-batches of all ranks and the accumulation steps so far",
}
LOSSES = {
    "switch": "E x sum of f_e P_e, 1 at perfect balance for any K; f_e (share of the choices, before drops) and P_e (mean score) taken",
    "z": "mean over tokens of logsumexp(logits)^2, which keeps router logits small",
    "importance": "squared coefficient of variation of the experts' summed scores",
    "load": "squared coefficient of variation of the smooth load",
    "usage_std": "standard deviation of the experts' mean scores",
}


def describe(setting: Setting) -> Section | None:
    if setting.layer is None:
        return None
    balance = setting.config.moe.balance
    coefficients = {name: getattr(balance, name) for name in LOSSES if getattr(balance, name)}
    words = [
        f"{name} x {value:g}: {_meaning(name, balance)}." for name, value in coefficients.items()
    ]
    if coefficients:
        words.append(
            "The losses are summed over the MoE layers and added to the cross-entropy; padding counts nowhere; the metrics report "
            "them without the coefficient."
        )
        if setting.config.moe.router.kind in ("fixed", "hash"):
            words.append("This router learns nothing, so they change nothing: they only measure.")
    if balance.bias:
        words.append(_bias(balance))
    numbers: dict[str, Any] = {
        "coefficients": coefficients,
        "switch_level": balance.switch_level,
        "bias_rate": balance.bias,
    }
    return Section(
        "balance",
        "Balance",
        words or ["Nothing balances the experts: no auxiliary loss, no bias."],
        numbers,
    )


def _meaning(name: str, balance: BalanceConfig) -> str:
    return f"{LOSSES[name]} {LEVEL[balance.switch_level]}" if name == "switch" else LOSSES[name]


def _bias(balance: BalanceConfig) -> str:
    recentred = ", then recentred to mean 0" if balance.recenter else ""
    return (
        f"Bias without a loss: after each step, b_e moves by {balance.bias:g} towards the experts chosen less than the mean over the "
        f"whole global batch{recentred}."
    )
