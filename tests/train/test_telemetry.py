"""A `train` line, recomputed from the recorded decisions of all ranks."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.config.schema import Config
from dmoe.distributed.exchange.comm_timer import CommTimer
from dmoe.moe.routers.base import LearnedRouter
from dmoe.runs.metrics_log import read_metrics
from dmoe.train.run import train
from dmoe.train.step_metrics import PHASES, StepTimer
from dmoe.train.telemetry import is_logged
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny
from tests.train.reference_metrics import Measured, by_layer, measured_step

pytestmark = pytest.mark.ranks

EXACT = ("load", "kept", "load_by_rank", "dead_experts", "traffic")
DROPS = "moe.capacity.factor=0.6"
CASES: dict[str, tuple[int, int, list[str]]] = {
    # name: ranks, ranks that share the experts, overrides
    "alone": (1, 1, []),
    "packed": (2, 2, []),
    "packed, drops, recomputed, accumulated": (
        2,
        2,
        [DROPS, "train.recompute=true", "train.micro_batch=2"],
    ),
    "padded, drops, accumulated": (2, 2, [DROPS, "moe.exchange=padded", "train.micro_batch=2"]),
    "padded, rerouted": (2, 2, [DROPS, "moe.exchange=padded", "moe.capacity.overflow=next_choice"]),
    "padded, pools": (2, 2, [DROPS, "moe.exchange=padded", "moe.capacity.pool=4"]),
    "copies of the experts": (4, 2, ["parallel.ep=2", DROPS, "moe.capacity.group=global"]),
    "every rank has all": (2, 1, ["parallel.ep=1", DROPS]),
    "fsdp": (2, 2, ["parallel.mode=fsdp", DROPS]),
    "adaptive": (2, 2, ["moe.router.kind=adaptive", "moe.router.k_min=2", "moe.top_k=3"]),
    "sigmoid and bias": (2, 2, ["moe.router.score=sigmoid", "moe.balance.bias=0.01"]),
}


def measured(world: int, *overrides: str) -> tuple[Config, list[Measured]]:
    config = tiny(*overrides)
    return config, run_ranks(world, measured_step, config)


@pytest.mark.parametrize("name", CASES)
def test_layers_equal_the_recount(name: str) -> None:
    world, ep, overrides = CASES[name]
    config, ranks = measured(world, *overrides)
    decisions = [decision for rank in ranks for decision in rank.decisions]
    expected = by_layer(decisions, config.moe.num_experts, ep)
    assert len(expected) == 2
    for rank in ranks:
        assert rank.line["layers"] == ranks[0].line["layers"]
    for told, recount in zip(ranks[0].line["layers"], expected, strict=True):
        for key, value in recount.items():
            if key in EXACT:
                assert told[key] == value, key
            else:
                assert told[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    if config.moe.capacity.pool == 4:
        for told in ranks[0].line["layers"]:
            rows = [sum(told["kept"][first : first + 4]) for first in (0, 4)]
            made = [sum(told["load"][first : first + 4]) for first in (0, 4)]
            slots = 2 * 4 * math.ceil(0.6 * sum(told["load"]) / 2 / 8)  # ranks, experts of a pool
            assert told["dropped_by_pool"] == [a - b for a, b in zip(made, rows, strict=True)]
            assert told["slots_used_by_pool"] == pytest.approx([row / slots for row in rows])
            assert told["fullest_pool"] == max(told["slots_used_by_pool"])
            assert told["emptiest_pool"] == min(told["slots_used_by_pool"])
    drops = sum(layer["drop_rate"] for layer in expected)
    assert (drops > 0) == (DROPS in overrides)


def test_gradient_norms_by_class() -> None:
    """Dense, experts and routers are all parameters; routers and dense are equal on both ranks."""
    _, ranks = measured(2, "optim.clip=0.1")
    line, experts = ranks[0].line, set(ranks[0].experts)
    assert experts
    squares = dict.fromkeys(("dense", "experts", "router"), 0.0)
    for name, square in ranks[0].squares.items():
        kind = "experts" if name in experts else "router" if ".router." in name else "dense"
        squares[kind] += square + (ranks[1].squares[name] if kind == "experts" else 0.0)
    for kind, square in squares.items():
        assert line[f"grad_norm_{kind}"] == pytest.approx(math.sqrt(square), rel=1e-4), kind
        assert square > 0
    assert line["grad_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)


def test_weighted_losses() -> None:
    _, (alone,) = measured(1, "moe.balance.switch=0.02", "moe.balance.z=0.5")
    line = alone.line
    for name, coefficient in (("switch", 0.02), ("z", 0.5)):
        raw = [layer["aux"][name] for layer in line["layers"]]
        assert [layer["aux_weighted"][name] for layer in line["layers"]] == pytest.approx(
            [coefficient * value for value in raw]
        )
        assert line["aux"][name] == pytest.approx(sum(raw) / 2)
        assert line["aux_weighted"][name] == pytest.approx(coefficient * sum(raw))


def test_bias() -> None:
    """After the step. Without recentering the biases can drift: `bias_drift` is their mean."""
    _, (alone,) = measured(1, "moe.balance.bias=0.25", "moe.balance.recenter=false")
    for layer, bias in zip(alone.line["layers"], alone.bias, strict=True):
        assert layer["bias_min"] == bias.min() == -0.25
        assert layer["bias_max"] == bias.max() == 0.25
        assert layer["bias_drift"] == pytest.approx(bias.mean())
    _, (without,) = measured(1)
    assert not any(key.startswith("bias") for key in without.line["layers"][0])


@pytest.mark.parametrize("exchange", ["packed", "padded"])
def test_bytes_exchanged(exchange: str) -> None:
    """Rows go out and back, forward and backward; packed also sends the counts per expert."""
    config, ranks = measured(2, f"moe.exchange={exchange}", DROPS, "train.micro_batch=2")
    width, experts = config.model.dim * 4, config.moe.num_experts
    layers = ranks[0].line["layers"]
    if exchange == "packed":
        rows = sum(layer["traffic"][0][1] + layer["traffic"][1][0] for layer in layers)
        counts = len(layers) * 2 * 2 * (experts // 2) * 8  # layers, ranks, accumulation steps
    else:
        slots = math.ceil(0.6 * config.moe.top_k * 2 * config.data.seq_len / experts)
        rows, counts = len(layers) * 2 * 2 * (experts // 2) * slots, 0
    assert ranks[0].line["bytes_exchanged"] == rows * width * 4 + counts


def test_no_bytes_on_one_rank() -> None:
    _, (alone,) = measured(1)
    assert alone.line["bytes_exchanged"] == 0
    assert alone.line["step_time"]["exchange"] == 0
    assert alone.line["straggler"] == 1
    assert alone.line["memory"] > 50e6  # Python and torch alone take more


def test_time_is_the_mean_and_the_straggler_the_slowest() -> None:
    """The second rank reads its data one second longer, which is much longer than the step."""
    _, ranks = measured(2)
    split, own = ranks[0].line["step_time"], [rank.seconds for rank in ranks]
    assert tuple(split) == PHASES
    for part in PHASES:
        assert (
            ranks[1].line["step_time"][part]
            == split[part]
            == pytest.approx(sum(seconds[part] for seconds in own) / 2)
        )
        assert split[part] > 0
    compute = [seconds["data"] + seconds["forward"] for seconds in own]
    assert ranks[0].line["straggler"] == pytest.approx(max(compute) / (sum(compute) / 2))
    assert compute[1] == max(compute) > 1


def test_mfu_counts_the_models_flops() -> None:
    """PaLM's convention: 6 FLOPs per token and weight, plus causal attention."""
    config, ranks = measured(2, "train.recompute=true", DROPS)
    model, moe, length = config.model, config.moe, config.data.seq_len
    attention, router, experts = (
        4 * model.dim**2,
        model.dim * moe.num_experts,
        moe.top_k * 3 * model.dim * moe.expert_dim,
    )
    weights = model.layers * (attention + router + experts) + VOCAB * model.dim
    attended = (
        model.layers * 2 * model.dim * (length + 1) / 2
    )  # scores and values, over half the sequence and the token itself
    flops = 3 * 2 * (weights + attended) * config.train.global_batch * length
    assert ranks[0].line["mfu"] == pytest.approx(flops / sum(rank.peak for rank in ranks))


class FakeTimer(StepTimer):
    """A timer whose clock shows given times."""

    def now(self) -> float:
        return self.time


def test_timer_books_every_second_once() -> None:
    """Forward takes 10 s, 4 of them in an all-to-all; backward 6, 1 of them in an all-to-all.

    Nothing after `stop_comm_timers` counts as all-to-all.
    """
    meter = CommTimer()
    watch = FakeTimer(torch.device("cpu"), [meter], began=100.0)
    watch.time = 102.0
    watch.mark("data")
    meter.seconds, meter.sent_bytes, watch.time = 4.0, 70, 112.0
    watch.mark("forward")
    meter.seconds, meter.sent_bytes, watch.time = 5.0, 90, 118.0
    watch.mark("backward")
    assert meter.clock is not None
    assert watch.stop_comm_timers() == 90
    assert meter.clock is None
    watch.time = 121.0
    watch.mark("optimizer")
    assert watch.seconds == {
        "data": 2,
        "forward": 6,
        "backward": 5,
        "exchange": 5,
        "optimizer": 3,
        "other": 0,
    }


@pytest.mark.parametrize("kind", ["fixed", "hash", "soft", "expert_choice"])
def test_meaningless_metrics_are_left_out(kind: str) -> None:
    more = (
        ["moe.top_k=8"]
        if kind == "soft"
        else ["moe.router.allow_future_leak=true"]
        if kind == "expert_choice"
        else []
    )
    _, (alone,) = measured(1, f"moe.router.kind={kind}", *more)
    layer = alone.line["layers"][0]
    learned = kind in ("soft", "expert_choice")
    assert (
        ("router_entropy" in layer)
        == ("logit_max" in layer)
        == ("top1_probability" in layer)
        == learned
    )
    assert ("drop_rate_by_choice" in layer) == ("dropped_mass_by_choice" in layer) == (not learned)
    assert {"load_cv", "kept", "traffic", "effective_k"} <= layer.keys()


def test_a_dense_model_has_no_layers() -> None:
    _, (alone,) = measured(1, "model.moe_every=0", "moe.balance.switch=0", "moe.balance.z=0")
    assert alone.line["layers"] == []
    assert alone.line["aux_weighted"] == {}
    assert alone.line["grad_norm_experts"] == alone.line["grad_norm_router"] == 0
    assert alone.line["grad_norm_dense"] == pytest.approx(alone.line["grad_norm"])


def test_which_steps_are_logged() -> None:
    config = tiny("train.log_every=4", "train.steps=10").train
    assert [done for done in range(1, 11) if is_logged(done, 0, config)] == [1, 4, 8, 10]
    assert [done for done in range(6, 11) if is_logged(done, 5, config)] == [6, 8, 10]


def test_a_collapsed_router_shows_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run in which all tokens go to expert 3 with certainty, as in metrics.jsonl."""
    logits = LearnedRouter.logits

    def collapsed(self: Any, *args: Any) -> Any:
        return logits(self, *args) + 30.0 * (torch.arange(8) == 3)

    monkeypatch.setattr(LearnedRouter, "logits", collapsed)
    options = (
        "moe.top_k=1",
        "moe.router.renormalize=false",
        "train.log_every=2",
        "train.eval_every=5",
        "train.sample_tokens=0",
    )
    train(tiny(*options, f"train.run_dir={tmp_path}"), "")
    lines = read_metrics(tmp_path / "metrics.jsonl")
    logged = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in logged] == [1, 2, 4, 6, 8, 10]
    for line in logged:
        assert line["load_max_over_mean"] == 8
        for layer in line["layers"]:
            assert (layer["load_max_over_mean"], layer["dead_experts"]) == (8, 7)
            assert layer["load"] == layer["kept"] == [0, 0, 0, 128, 0, 0, 0, 0]
            assert layer["load_cv"] == pytest.approx(math.sqrt(7))
            assert layer["router_entropy"] == pytest.approx(0, abs=1e-6)
            assert layer["top1_probability"] == pytest.approx(1)
            assert 29 < layer["logit_max"] < 35
    alerts = [
        line["text"]
        for line in lines
        if line["event"] == "alert" and "usually helps" in line["text"]
    ]
    assert [text.split(":")[0] for text in alerts] == [
        "expert collapse",
        "dead experts",
        "router saturation",
    ]
    assert all("layers 0, 1" in text for text in alerts)
    first, last = (line["layers"] for line in lines if line["event"] == "eval")
    for earlier, later in zip(first, last, strict=True):
        assert "stability" not in earlier
        assert later["stability"] == 0
        pairs = later["co_selection"]
        assert pairs[3][3] == 128
        assert sum(map(sum, pairs)) == 128


def test_experts_of_different_shape() -> None:
    """The largest expert has a rank of its own, the other three share one.

    Once loads by rank were cut by id, two and two. The cost of a token is the work of the experts
    that computed it, as a fraction of the work of all experts.
    """
    widths = [(), (8,), (8,), (96,)]
    _, ranks = measured(
        2,
        f"moe.experts.shapes={[list(shape) for shape in widths]}".replace(" ", ""),
        "moe.num_experts=4",
        "moe.experts.kind=gelu",
        "moe.top_k=4",
        "moe.router.kind=budget",
        "moe.router.budget=0.6",
        "moe.router.renormalize=false",
    )
    work = [sum(a * b for a, b in zip((32, *shape), (*shape, 32), strict=True)) for shape in widths]
    decisions = [decision for rank in ranks for decision in rank.decisions]
    for layer, told in enumerate(ranks[0].line["layers"]):
        chosen = Counter(
            int(e)
            for d in decisions
            if d.layer == layer
            for e in d.final_expert[d.kept.astype(bool)]
        )
        assert told["load_by_rank"] == [chosen[3], chosen[0] + chosen[1] + chosen[2]]
        spent = sum(work[expert] * count for expert, count in chosen.items())
        assert told["cost_share"] == pytest.approx(spent / sum(work) / (8 * 16))
