"""Copies for the step on real ranks: every number is that without copies, within rounding.

Also counted: collectives, host reads and bytes; and what happens where the ranks have no copies.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.schema import CapacityConfig, ExpertsConfig, RouterConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.distributed.placement.copies import CopyingAllToAll
from dmoe.distributed.placement.copy_cost import measure_break_even
from dmoe.moe.copy_planner import CopyRule
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from tests.distributed.test_costs import COLLECTIVES, READS, counted
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks

DIM, HIDDEN, EXPERTS = 16, 12, 8
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two by two": {"ep": 2},
    "drops and zero-cost": {"ep": 2, "factor": 1.0, "zero": 2},
    "recomputed": {"recompute": True},
    "experts recomputed": {"ep": 2, "recompute_experts": True},
    "frozen w_in": {"frozen": True},
    "one slot": {"slots": 1},
    "hot rank": {"workload": "W2"},
    "empty rank": {"workload": "W5"},
    "nothing to copy": {"workload": "W0"},
}


def layer_of(factor: float | None = None, zero: int = 0, workload: str | None = None) -> MoE:
    router = RouterConfig()
    if workload is not None:
        router = RouterConfig(kind="workload", workload=workload, ranks=4, hot=1.6)
    layer = MoE(
        DIM,
        HIDDEN,
        EXPERTS,
        2,
        router=router,
        capacity=CapacityConfig(factor=factor),
        experts=ExpertsConfig(zero=zero),
    )
    layer.initialize(3, std=0.3)
    if workload is None:
        with torch.no_grad():  # type: ignore[no-untyped-call]
            layer.router.weight[:2] *= 4  # two experts of rank 0 are hot
    return layer.double()


def numbers(
    mesh: Any,
    rank: int,
    slots: int,
    recompute: bool = False,
    recompute_experts: bool = False,
    frozen: bool = False,
    **options: Any,
) -> tuple[dict[str, np.ndarray], int]:
    """Run two micro-batches, forward and backward; return all numbers, and the copies here."""
    layer = layer_of(**options)
    shard_experts(layer, mesh, copies=CopyRule.of(slots))
    layer.experts.w_in.requires_grad_(not frozen)
    layer.recompute_experts = recompute_experts
    timer = layer.packed.expert_group.timer  # type: ignore[attr-defined]
    timer.start(time.perf_counter)
    found = {}
    for batch in range(2):
        generator = torch.Generator().manual_seed(10 * rank + batch)
        x = torch.randn(2, 24, DIM, generator=generator, dtype=torch.float64).requires_grad_()
        context = TokenContext(noise_key=(0, batch), first_sequence=2 * mesh.rank)

        def forward(x: Tensor, context: TokenContext = context) -> tuple[Tensor, Tensor]:
            out = layer(x, context)
            return out.y, out.stats.kept_E

        y, kept_E = checkpoint(forward, x, use_reentrant=False) if recompute else forward(x)
        (y.square().sum() * (1 + batch)).backward()
        found |= {f"y{batch}": y, f"x{batch}": x.grad, f"kept{batch}": kept_E}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: value.detach().numpy() for name, value in found.items()}, timer.copies.copies


def both(rank: int, world: int) -> dict[str, tuple[float, int]]:
    """Return the largest relative difference of each variant, and the copies on this rank."""
    found, meshes = {}, {ep: build_mesh(ep, torch.device("cpu")) for ep in (2, 4)}
    for name, given in VARIANTS.items():
        options = dict(given)
        mesh, slots = meshes[options.pop("ep", 4)], options.pop("slots", 2)
        fixed, none = numbers(mesh, rank, 0, **options)
        copied, copies = numbers(mesh, rank, slots, **options)
        assert none == 0
        assert fixed.keys() == copied.keys()
        assert ("experts.w_in" in fixed) != options.get("frozen", False)
        for key in fixed:
            if key.startswith("kept"):
                assert (fixed[key] == copied[key]).all()
        found[name] = (
            max(np.abs(copied[k] - v).max() / max(1e-3, np.abs(v).max()) for k, v in fixed.items()),
            copies,
        )
    return found


def test_every_number_is_that_without_copies() -> None:
    """Outputs and all gradients of two accumulated micro-batches, in float64 to 12 digits."""
    ranks = run_ranks(4, both)
    for name in VARIANTS:
        assert max(rank[name][0] for rank in ranks) < 1e-12, name
        assert any(rank[name][1] for rank in ranks) == (name != "nothing to copy"), name


def costs(rank: int, world: int) -> dict[str, Any]:
    """Count collectives, host reads and bytes of a layer with a hot rank."""
    from torch import distributed

    layer = layer_of(workload="W2")
    mesh = build_mesh(world, torch.device("cpu"))
    shard_experts(layer, mesh, copies=CopyRule(2))
    layer.experts.__class__ = CountlessExperts
    x = torch.randn(1, 64, DIM, dtype=torch.float64).requires_grad_()
    context = TokenContext(noise_key=(0, 0), first_sequence=rank)
    layer(x, context).y.sum().backward()
    made, read = Counter[str](), Counter[str]()
    for name in COLLECTIVES:
        setattr(distributed, name, counted(made, name, getattr(distributed, name)))
    for name in (*READS, "numpy"):
        setattr(torch.Tensor, name, counted(read, name, getattr(torch.Tensor, name)))
    timer = layer.packed.expert_group.timer  # type: ignore[attr-defined]
    timer.start(time.perf_counter)
    y = layer(x, context).y
    forward = (made.total(), read.total())
    y.sum().backward()
    return {
        "forward": forward,
        "all": (made.total(), read.total()),
        "copies": timer.copies,
        "bytes": timer.sent_bytes,
        "break_even": measure_break_even(layer, mesh, torch.float32),
        "rule": layer.packed.rule,  # type: ignore[attr-defined]
    }


class CountlessExperts(type(layer_of().experts)):  # type: ignore[misc]
    """Experts that read nothing on the host: the real ones loop over counts on the CPU."""

    def forward(self, rows: Tensor, counts: Any) -> Tensor:
        (own, _), copied = counts.send([self.w_in, self.w_out])
        return rows + sum(stack.sum() for stack in (own, *copied))


def test_collectives_host_reads_and_bytes() -> None:
    """One all-to-all more in forward and in backward, still one host read; all bytes are counted.

    EP 2, 64 tokens per rank, W2 with 4 ranks: the hot experts are two of the four of one rank.
    """
    ranks = run_ranks(2, costs)
    for found in ranks:
        assert found["forward"] == (4, 1)
        assert found["all"] == (7, 1)
        assert found["break_even"] == ranks[0]["break_even"] == found["rule"].break_even
    copies = [found["copies"] for found in ranks]
    assert sum(c.copies for c in copies) > 0
    assert copies[0].rows == copies[1].rows < copies[0].rows_fixed
    # an expert's two matrices in float64, there and back
    one = DIM * 3 * HIDDEN * 8
    assert sum(c.sent_bytes for c in copies) == 2 * one * sum(c.copies for c in copies)
    rows = [found["bytes"] - c.sent_bytes for found, c in zip(ranks, copies, strict=True)]
    assert all((sent - EXPERTS * 8) % (DIM * 8) == 0 for sent in rows), "counts and rows alone"


def in_a_loop(rank: int, world: int, mode: str | None) -> list[np.ndarray]:
    """Train two steps in a loop of one's own, with and without copies; return the outputs."""
    found = []
    for copies in (0, 2, "auto"):
        model = torch.nn.ModuleDict({"moe": layer_of(), "out": torch.nn.Linear(DIM, 1).double()})
        torch.nn.init.ones_(model["out"].weight), torch.nn.init.zeros_(model["out"].bias)
        net = Net(copy.deepcopy(model))
        parallel = dmoe.parallelize(net, ep=2, mode=mode, copies=copies)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(2):
            x = torch.randn(2, 16, DIM, generator=generator, dtype=torch.float64)
            loss = parallel(x).square().mean()
            parallel.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found.append(parallel(x).numpy())
    dist.barrier()
    return found


class Net(torch.nn.Module):
    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.moe, self.out = parts["moe"], parts["out"]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.moe(x).y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_loop_of_ones_own_with_copies(mode: str) -> None:
    """`dmoe.parallelize(copies=...)` on four ranks, EP 2, so with replicas: the same outputs."""
    for none, two, auto in run_ranks(4, in_a_loop, mode):
        assert two == pytest.approx(none, rel=1e-12, abs=1e-12)
        assert auto == pytest.approx(none, rel=1e-12, abs=1e-12)


def refusals(rank: int, world: int) -> list[str]:
    found = []
    for layer, copies in (
        (MoE(8, 8, 4, 2, exchange="padded", capacity=CapacityConfig(factor=1.0)), 2),
        (MoE(8, 8, 4, 2, experts=ExpertsConfig(shapes=[[8], [4], [4], [8]])), "auto"),
        (MoE(8, 8, 4, 2), -1),
        (MoE(8, 8, 4, 2), "some"),
    ):
        with pytest.raises(ConfigError) as error:
            dmoe.parallelize(layer, ep=2, copies=copies)
        found.append(str(error.value))
    assert not isinstance(MoE(8, 8, 4, 2).packed, CopyingAllToAll)
    return found


def test_refusals() -> None:
    padded, shapes, negative, unknown = run_ranks(2, refusals)[0]
    assert "copies=2: saves nothing with padded slots" in padded
    assert "copies=auto: needs dmoe's own experts of one shape" in shapes
    assert "copies=-1: must be auto or a number" in negative
    assert "copies=some: must be auto or a number" in unknown
