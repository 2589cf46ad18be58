"""Settings outside of the ranges that the literature recommends: remarks, no refusals."""

from __future__ import annotations

from dmoe.config.recommended import outside
from dmoe.explain.section import Section
from dmoe.explain.setting import Setting


def describe(setting: Setting) -> Section | None:
    """None where everything is inside, which is the case to hear nothing about."""
    remarks = outside(setting.config) if setting.layer is not None else []
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
    return Section(
        "recommended", "Outside of recommended ranges", [str(remark) for remark in remarks], numbers
    )
