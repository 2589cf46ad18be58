"""Options of the exchange on real ranks: every number is that of the plain exchange.

Also: what runs beside what, collectives, host reads, bytes, and what is refused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import dmoe.verify.verify as verification
from dmoe.config.schema import CapacityConfig, ExchangeConfig, ExpertsConfig, RouterConfig
from dmoe.distributed.all_to_all import ExpertGroup
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.moe.layer import MoE
from dmoe.moe.routing import Routing, TokenContext
from dmoe.verify.cases import CasePlan, plan_cases
from dmoe.verify.verify import verify
from tests.distributed.test_heterogeneous_experts import lines
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

DIM, HIDDEN, EXPERTS = 16, 12, 8
PADDED: dict[str, Any] = {"exchange": "padded", "factor": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared": 2},
    "all local but two": {"ep": 2, "shared": 1},
    "padded": {**PADDED, "shared": 1},
    "padded, two by two": {**PADDED, "ep": 2, "zero": 2},
    "drops and zero-cost": {"ep": 2, "factor": 0.8, "zero": 2, "shared": 1},
    "pooled": {**PADDED, "pool": 2},
    "recomputed": {"recompute": True, "shared": 1},
    "experts recomputed": {"ep": 2, "recompute_experts": True, "shared": 1},
    "frozen w_in": {"frozen": True},
    "two choices": {"top_k": 2},
    "one expert three times": {"repeated": True},
    "hot rank": {"workload": "W2", "top_k": 2, "shared": 1},
    "empty rank": {"workload": "W5", "top_k": 2},
    "ragged sources": {"tokens": (0, 3, 24, 1), "shared": 1},
    "no tokens": {"tokens": (0, 0, 0, 0), "shared": 1},
    "no tokens, padded": {**PADDED, "tokens": (0, 0, 0, 0), "zero": 2},
    "no tokens, pooled": {**PADDED, "tokens": (0, 0, 0, 0), "pool": 2},
    "different shapes": {"shapes": [[12], [4], [4], [8], [12], [8], [4], []], "shared": 1},
    "geglu": {"kind": "gelu", "shared": 1},
    "bf16 rows": {"dtype": torch.bfloat16, "shared": 1},
}
EMPTY = ("no tokens", "no tokens, padded")
EDGES = ("padded", "drops and zero-cost", "empty rank", "ragged sources", *EMPTY)
OPTIONS: dict[str, tuple[ExchangeConfig, float]] = {
    "overlap": (ExchangeConfig(overlap=True), 0.0),
    "chunks": (ExchangeConfig(chunks=2), 0.0),
    "chunks, overlap": (ExchangeConfig(chunks=2, overlap=True), 0.0),
    "levels": (ExchangeConfig(levels=2), 0.0),
    "levels, once per rank": (ExchangeConfig(levels=2, once_per_rank=True), 8),
    "once per rank": (ExchangeConfig(once_per_rank=True), 8),
}
"""Options, and the largest difference that they may make, in roundings of the largest number."""
CHUNKED = ("shared", *EDGES, "recomputed", "experts recomputed", "frozen w_in", "bf16 rows")
TWO_LEVELS = ("plain", "pooled", "no tokens, pooled", *EDGES)
"""The variants of these options: not those that differ in what is computed alone."""


def layer_of(
    factor: float | None = None,
    exchange: str = "packed",
    workload: str | None = None,
    dtype: torch.dtype = torch.float64,
    top_k: int = 4,
    pool: int = 1,
    **experts: Any,
) -> MoE:
    router = RouterConfig()
    if workload is not None:
        router = RouterConfig(kind="workload", workload=workload, ranks=4, hot=1.6)
    layer = MoE(
        DIM,
        HIDDEN,
        EXPERTS,
        top_k,
        router=router,
        capacity=CapacityConfig(factor=factor, pool=pool),
        experts=ExpertsConfig(**experts),
        exchange=exchange,
    )
    layer.initialize(3, std=0.3)
    return layer.to(dtype)


def with_repeats(route: Any, *arguments: Any) -> Routing:
    """Route as a router of one's own may: the second choice of a token is also all later ones."""
    routing: Routing = route(*arguments)
    columns = torch.arange(routing.expert_TK.shape[1]).clamp(max=1)
    return replace(routing, expert_TK=routing.expert_TK[:, columns])


def numbers(
    mesh: Any,
    config: ExchangeConfig | None,
    recompute: bool = False,
    recompute_experts: bool = False,
    frozen: bool = False,
    repeated: bool = False,
    tokens: tuple[int, ...] = (24, 24, 24, 24),
    **options: Any,
) -> dict[str, np.ndarray]:
    """Run two micro-batches, forward and backward; return outputs, counts and all gradients."""
    layer, found = layer_of(**options), dict[str, Tensor]()
    shard_experts(layer, mesh, exchange=config)
    if frozen:
        layer.experts.w_in.requires_grad_(False)
    layer.recompute_experts = recompute_experts
    if repeated:
        layer.router.forward = partial(with_repeats, layer.router.forward)
    for batch in range(2):
        generator = torch.Generator().manual_seed(10 * mesh.rank + batch)
        x = torch.randn(2, tokens[mesh.rank], DIM, generator=generator, dtype=torch.float64)
        x = x.to(options.get("dtype", torch.float64)).requires_grad_()
        context = TokenContext(noise_key=(0, batch), first_sequence=2 * mesh.rank)

        def forward(x: Tensor, context: TokenContext = context) -> tuple[Tensor, Tensor]:
            out = layer(x, context)
            return out.y, out.stats.as_vector()

        y, stats = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        (y.square().sum() * (1 + batch)).backward()
        assert x.grad is not None
        found |= {f"y{batch}": y, f"x{batch}": x.grad, f"stats{batch}": stats}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: value.detach().double().numpy() for name, value in found.items()}


def compared(rank: int, world: int) -> dict[tuple[str, str], float]:
    """Return the largest relative difference of each variant and option."""
    found = {}
    meshes = {2: build_mesh(2, torch.device("cpu"))}
    meshes[4] = build_mesh(4, torch.device("cpu"), node_size=2)
    for name, given in VARIANTS.items():
        settings = dict(given)
        mesh = meshes[settings.pop("ep", 4)]
        plain = numbers(mesh, None, **settings)
        if name.startswith("no tokens"):
            assert not any(value.any() for value in plain.values()), name
        for option, (config, _) in OPTIONS.items():
            if config.once_per_rank and "exchange" in settings:
                continue  # refused
            if config.overlap and "pool" in settings:
                continue  # refused
            if config.chunks > 1 and name not in CHUNKED:
                continue
            if config.levels > 1 and (name not in TWO_LEVELS or mesh.ep == 2):
                continue
            other = numbers(mesh, config, **settings)
            assert plain.keys() == other.keys()
            assert all((plain[f"stats{n}"] == other[f"stats{n}"]).all() for n in range(2))
            epsilon = torch.finfo(settings.get("dtype", torch.float64)).eps
            found[name, option] = max(
                np.abs(other[key] - value).max(initial=0)
                / np.abs(value).max(initial=1e-3)
                / epsilon
                for key, value in plain.items()
            )
    return found


def test_every_number_is_that_of_the_plain_exchange() -> None:
    """Outputs, counts and gradients of two accumulated micro-batches, at EP 2 and 4.

    Where no rank had a token, padded and pooled slots raised ("cannot reshape tensor of 0 elements
    into shape [4, -1, 0, 16]"). Every gradient exists and is zero.
    """
    for rank in run_ranks(4, compared, timeout=240.0):
        for (name, option), difference in rank.items():
            assert difference <= OPTIONS[option][1], f"{name}, {option}: {difference:.1e}"


class _Rounded(Function):
    """Rows rounded to bf16 in forward or in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, forward: bool) -> Tensor:
        ctx.forward = forward
        return rows.bfloat16().to(rows.dtype) if forward else rows.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] if ctx.forward else grads[0].bfloat16().to(grads[0].dtype)), None


def rounded(rank: int, world: int) -> list[tuple[bool, float]]:
    """Compare a bf16 wire with rows and gradients that are rounded before a plain exchange.

    Returns whether they are equal to the bit, and the difference from rows that are not rounded.
    """
    mesh, found = build_mesh(world, torch.device("cpu")), []
    exchanged = ExpertGroup.all_to_all_autograd

    def naive(self: ExpertGroup, rows: Tensor, *arguments: Any) -> Tensor:
        received = exchanged(self, _Rounded.apply(rows, True), *arguments)
        return _Rounded.apply(received, False)  # type: ignore[no-any-return]

    for settings in ({"shared": 1}, PADDED):
        wire = numbers(mesh, ExchangeConfig(wire="bf16"), **settings)
        both = numbers(mesh, ExchangeConfig(wire="bf16", overlap=True), **settings)
        full = numbers(mesh, None, **settings)
        ExpertGroup.all_to_all_autograd = naive  # type: ignore[method-assign]
        expected = numbers(mesh, None, **settings)
        ExpertGroup.all_to_all_autograd = exchanged  # type: ignore[method-assign]
        equal = all((wire[key] == value).all() for key, value in expected.items())
        equal &= all((both[key] == value).all() for key, value in expected.items())
        apart = [
            np.linalg.norm(wire[k] - v) / max(1e-3, np.linalg.norm(v)) for k, v in full.items()
        ]
        found.append((equal, float(max(apart))))
    return found


def test_a_bf16_wire_rounds_rows_and_nothing_else() -> None:
    """The numbers of rows and gradients that are rounded once per direction; weights are not."""
    for rank in run_ranks(2, rounded):
        for equal, difference in rank:
            assert equal
            assert 1e-4 < difference < 2**-7


VERIFIED: dict[str, tuple[str, list[str]]] = {
    "overlap=true": ("EP=2 padded", ["moe.experts.shared=1"]),
    "chunks=4": ("EP=2 packed fsdp", []),
    "levels=2": ("EP=4 padded ddp", []),
    "once_per_rank=true": ("EP=2 packed", ["moe.top_k=4"]),
}
"""Options, the cases on 4 ranks, and what else is set."""


@pytest.mark.slow
def test_verify_compares_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """ddp and fsdp with replicas, accumulation, checkpoints, at EP 2; two nodes at EP 4."""
    for option, (wanted, more) in VERIFIED.items():

        def few_cases(*arguments: Any, wanted: str = wanted) -> CasePlan:
            plan = plan_cases(*arguments)
            cases = [case for case in plan.cases if f"{case} ".startswith(f"4 ranks {wanted} ")]
            return replace(plan, cases=[c for c in cases if not c.recompute and not c.tied])

        monkeypatch.setattr(verification, "plan_cases", few_cases)
        settings = ["model.layers=1", "moe.capacity.factor=1.25", "parallel.exchange.wire=bf16"]
        report = verify(tiny(*settings, f"parallel.exchange.{option}", *more), worlds=[4])
        assert report.ok, lines(report)
        number = 1 if wanted.endswith(("ddp", "fsdp")) else 2
        assert len(report.cases) == number, report.cases
        assert "compared in full" in report.refused["parallel.exchange.wire=bf16"]
