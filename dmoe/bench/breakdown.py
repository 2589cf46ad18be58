"""Where a layer's time goes: operators grouped by what they serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

OWNERS = {
    "_Permute": "permute",
    "_Unpermute": "combine",
    "_OneByOne": "experts",
    "_GroupedLinear": "experts",
    "_Activate": "experts",
}
PRODUCTS = ("aten::mm", "aten::bmm", "aten::_grouped_mm", "aten::addmm", "aten::matmul")
REPEATS = 5


def profile_layer(run: Callable[[], None]) -> dict[str, float]:
    """Measure each part's share of one forward and backward, largest first.

    An operator belongs to the autograd function it ran under, forward or backward. Matrix products
    of the experts are `grouped GEMMs`, whatever else runs there is `activation`; what belongs to no
    function is `route`: the router, its losses and statistics.
    """
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(REPEATS):
            run()
    parts: dict[str, float] = {}
    for event in recorded.events():
        part = _part_of(event)
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total
    total = sum(parts.values())
    return {part: value / total for part, value in sorted(parts.items(), key=lambda item: -item[1])}


def _part_of(event: Any) -> str:
    node, is_product = event, False
    while node is not None:
        name: str = node.name
        is_product = is_product or name in PRODUCTS
        for function, owner in OWNERS.items():
            if name in (
                function,
                f"{function}Backward",
                f"autograd::engine::evaluate_function: {function}Backward",
            ):
                if owner != "experts":
                    return owner
                return "grouped GEMMs" if is_product else "activation"
        node = node.cpu_parent
    return "route"
