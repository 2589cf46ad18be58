"""Numbers of `dmoe explain` against a real layer, real ranks and the real schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe.config.rules import batching, expert_parallel
from dmoe.config.schedule import learning_rate
from dmoe.config.schema import Config
from dmoe.distributed import all_to_all, mesh
from dmoe.distributed.expert_parallel import expert_parameters, shard_experts
from dmoe.distributed.mesh import ParallelMesh
from dmoe.explain import explain
from dmoe.models.transformer import Transformer
from dmoe.moe.layer import MoE
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny


def numbers(config: Config, world: int) -> dict[str, dict[str, Any]]:
    return {section.key: section.numbers for section in explain(config, world)}


@pytest.mark.parametrize("group", ["rank", "sequence", "global"])
@pytest.mark.parametrize(("factor", "virtual"), [(1.25, 1), (1.0, 2), (0.3, 4), (1.1, 2)])
def test_capacity_equals_the_layers(group: str, factor: float, virtual: int) -> None:
    """All tokens choose the same experts, so those keep as many as they have slots."""
    config = tiny(
        f"moe.capacity.factor={factor}",
        f"moe.capacity.group={group}",
        f"parallel.virtual_ranks={virtual}",
    )
    explained = numbers(config, 1)["capacity"]
    layer = MoE.from_config(config.moe, config.model.dim, virtual_ranks=virtual)
    sequences = batching(config, 1).micro_batch * virtual
    kept_E = layer(torch.ones(sequences, config.data.seq_len, config.model.dim)).stats.kept_E
    tokens = sequences * config.data.seq_len
    groups = {"rank": virtual, "sequence": sequences, "global": 1}[group]
    assert (
        int(kept_E.max()) == explained["slots"] * groups == explained["slots"] * explained["groups"]
    )
    assert explained["tokens_per_group"] * groups == tokens
    assert explained["slots_total"] == explained["slots"] * groups * 8
    assert explained["fair_share"] == config.moe.top_k * tokens / groups / 8
    assert factor <= explained["load_over_fair_share"] < factor + 1 / explained["fair_share"]


def test_the_moves_of_experts() -> None:
    """A moved expert has two matrices in float32, and two moments of each."""
    periodic = tiny("parallel.placement.kind=periodic", "parallel.placement.every=7")
    explained = numbers(periodic, 4)["experts"]
    assert explained["placement_every"] == 7
    assert explained["moved_expert_bytes"] == 3 * 4 * (32 * 2 * 24 + 24 * 32)
    (alone,) = [section for section in explain(periodic, 1) if section.key == "experts"]
    assert "do not move" in " ".join(alone.sentences)
    assert "moved_expert_bytes" not in numbers(tiny(), 4)["experts"]


def test_the_global_group_spans_all_ranks() -> None:
    config = tiny("moe.capacity.factor=1.5", "moe.capacity.group=global", "train.micro_batch=1")
    explained = numbers(config, 4)["capacity"]
    assert explained["tokens_per_group"] == 4 * 16
    assert explained["slots"] == math.ceil(1.5 * 2 * 64 / 8)


def test_owners_equal_the_mesh() -> None:
    explained = numbers(tiny("parallel.ep=4"), 8)["experts"]
    owner = {rank: entry["experts"] for entry in explained["owners"] for rank in entry["ranks"]}
    assert owner == {
        rank: list(ParallelMesh(rank=rank, world_size=8, ep=4).local_experts(8))
        for rank in range(8)
    }
    assert (explained["ep"], explained["edp"]) == (4, 2)


def test_batch_parts_multiply_to_the_global_batch() -> None:
    explained = numbers(tiny("train.micro_batch=1", "parallel.virtual_ranks=2"), 2)["batch"]
    assert (
        explained["world"]
        * explained["virtual_ranks"]
        * explained["micro_batch"]
        * explained["accumulation"]
        == explained["global_batch"]
        == 8
    )
    assert (
        explained["accumulation"],
        explained["tokens_per_forward"],
        explained["tokens_per_step"],
    ) == (
        2,
        32,
        128,
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
def test_first_and_last_learning_rate(schedule: str) -> None:
    config = tiny(f"optim.schedule={schedule}", "train.steps=50")
    explained = numbers(config, 1)["optimization"]
    rates = [learning_rate(step, 50, config.optim) for step in range(50)]
    assert (explained["first"], explained["last"], explained["peak"]) == (
        rates[0],
        rates[-1],
        max(rates),
    )


def test_flops_are_two_per_multiply_add() -> None:
    """Count attention's four matrices and its scores, K experts, router and output by hand."""
    config = tiny()
    width, hidden, length = 32, 24, 16
    block = 4 * width * width + 2 * 3 * width * hidden + width * 8
    attended = 2 * width * (length + 1) / 2
    forward = 2 * (2 * (block + attended) + VOCAB * width)
    explained = numbers(config, 1)["size"]
    assert explained["flops_per_token_forward"] == forward
    assert explained["flops_per_step"] == 3 * forward * 8 * 16


@dataclass
class Measured:
    """Sizes and traffic of one rank."""

    dense: int
    experts: int
    owned: list[int]
    sent: dict[str, list[int]]
    """Bytes sent by this rank per exchange of rows, forward and backward."""
    collectives: dict[str, tuple[int, int]]


class Recorder:
    """Wrapper of torch's all-to-all that records the bytes sent by this rank."""

    def __init__(self, real: Any, rank: int, world: int) -> None:
        self.real, self.rank, self.world, self.sent, self.calls = real, rank, world, list[int](), 0

    def __call__(self, received: Tensor, rows: Tensor, receive: Any, send: Any, group: Any) -> Any:
        self.calls += 1
        kept = len(rows) // self.world if send is None else send[self.rank]
        if rows.is_floating_point():
            self.sent.append((len(rows) - kept) * rows[0].numel() * rows.element_size())
        return self.real(received, rows, receive, send, group=group)


def measure(rank: int, world: int, config: Config) -> Measured:
    """Shard a model and run a balanced batch through its first layer, packed and padded."""
    groups = mesh.build_mesh(expert_parallel(config, world), torch.device("cpu"))
    model = Transformer(config.model, config.moe, VOCAB)
    shard_experts(model, groups)
    experts = sum(p.numel() for p in expert_parameters(model).values())
    layer = model.moe_layers()[0]
    owned = list(range(layer.experts.first, layer.experts.first + len(layer.experts.w_in)))
    measured = Measured(
        sum(p.numel() for p in model.parameters()) - experts, experts, owned, {}, {}
    )
    dispatchers = {"packed": None, "padded": layer.padded}
    for name, padded in dispatchers.items():
        layer.padded = padded
        recorder = Recorder(all_to_all.dist.all_to_all_single, rank, world)
        all_to_all.dist.all_to_all_single = recorder  # type: ignore[assignment]
        x = balanced(layer, batching(config, world).micro_batch, config.data.seq_len)
        y = layer(x).y
        forward = recorder.calls
        y.sum().backward()
        all_to_all.dist.all_to_all_single = recorder.real
        measured.sent[name], measured.collectives[name] = (
            recorder.sent,
            (forward, recorder.calls - forward),
        )
    return measured


def balanced(layer: MoE, sequences: int, length: int) -> Tensor:
    """Return inputs for which token t chooses the experts t and t+1 (modulo E)."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, : layer.num_experts] = torch.eye(layer.num_experts)
    x = torch.zeros(sequences * length, layer.router.weight.shape[1])
    token = torch.arange(len(x))
    x[token, token % layer.num_experts] = 2.0
    x[token, (token + 1) % layer.num_experts] = 1.0
    return x.view(sequences, length, -1).requires_grad_()


@pytest.mark.parametrize(
    ("option", "expected"),
    [("chunks=4", (9, 8, 1)), ("levels=2", (6, 4, 1)), ("once_per_rank=true", (3, 2, 1))],
)
def test_collectives_of_an_option(option: str, expected: tuple[int, int, int]) -> None:
    """Those that tests/distributed/test_exchange_costs.py counts."""
    found = numbers(tiny(f"parallel.exchange.{option}"), 2)["exchange"]
    names = ("collectives_forward", "collectives_backward", "host_syncs")
    assert tuple(found[name] for name in names) == expected


@pytest.mark.parametrize("pool", [1, 8])
def test_bytes_parameters_and_owners_equal_two_real_ranks(pool: int) -> None:
    """A pool of all eight experts has rows for all its slots on either rank."""
    limits = ["moe.capacity.factor=1.25", f"moe.capacity.pool={pool}"]
    padded = tiny("moe.exchange=padded", *limits)
    explained = {
        "packed": numbers(tiny(*limits), 2),
        "padded": numbers(padded, 2),
    }
    for rank, measured in enumerate(run_ranks(2, measure, padded)):
        size = explained["padded"]["size"]
        assert (measured.dense, measured.experts) == (
            size["rank_dense_parameters"],
            size["rank_expert_parameters"],
        )
        assert size["rank_bytes"]["total"] == 16 * (measured.dense + measured.experts)
        assert measured.owned == explained["padded"]["experts"]["owners"][rank]["experts"]
        for name, sections in explained.items():
            exchange = sections["exchange"]
            assert measured.sent[name] == [exchange["bytes_forward"]] * 4, (
                "two out and back, forward and backward"
            )
            assert measured.collectives[name] == (
                exchange["collectives_forward"],
                exchange["collectives_backward"],
            )
            assert exchange["bytes_per_step"] == 2 * sum(measured.sent[name]), (
                "two MoE layers, nothing accumulated"
            )
