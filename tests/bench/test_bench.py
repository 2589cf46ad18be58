"""`dmoe bench` and its counters. Nothing is asserted of a time."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from dmoe.bench.balance import run as run_balance
from dmoe.bench.exchange import run as run_exchange
from dmoe.bench.layer import Shape, contenders
from dmoe.bench.libraries import OVER_RANKS
from dmoe.bench.measure import KernelCounter, interleave, peak_bytes, quartiles, saved_bytes
from dmoe.bench.options import forced_router
from dmoe.bench.step import SHAPES, our_config, their_model
from dmoe.models.transformer import Transformer
from dmoe.moe.layer import MoE
from tests.cli.commands import dmoe, run_in_process

TINY = ("--tokens", "64", "--dim", "16", "--hidden", "16", "--experts", "4", "--rounds", "2")


def test_every_contender_runs_once_per_round_in_an_order_that_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(runs, rounds=3, warmup=0)
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 3)
    assert quartiles([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)


def test_the_counters_count_what_is_known() -> None:
    """A product keeps its two inputs, of which a parameter does not count; views launch nothing."""
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    x = torch.zeros(32, 8)
    assert saved_bytes(lambda: (x @ weight).sigmoid()) == 2 * 32 * 8 * 4
    with KernelCounter() as counter:
        (x @ weight).view(-1)[3:].sum()
    assert counter.names == ["mm", "sum"]
    assert peak_bytes(lambda: torch.zeros(1000).relu()) == 8000


def test_the_layer_is_compared_with_its_peers_and_counted(tmp_path: Path) -> None:
    result = run_in_process("bench", "layer", *TINY, "--dtype", "fp32", "--json", cwd=tmp_path)
    report = json.loads(result.stdout)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows)[:2] == ["gemms", "dmoe"]
    assert rows["gemms"]["ratio"] == 1.0
    assert rows["dmoe"]["saved_per_token"] > 0
    assert set(report["difference"].get("transformers", {"y"})) >= {"y"}
    padded = ("--capacity", "1.0", "--exchange", "padded", "--breakdown")
    shown = run_in_process("bench", "layer", *TINY, *padded, cwd=tmp_path).stdout
    assert "breakdown: gemms products " in shown
    assert "capacity 1, exchange padded" in shown
    wrong = dmoe("bench", "layer", "--dtype", "fp8", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--dtype=fp8: must be bf16 or fp32" in wrong.stderr


def test_the_layer_is_measured_under_a_workload(tmp_path: Path) -> None:
    """W2 at twice the mean: half of the rows are for one of four experts' ranks."""
    found = run_in_process(
        "bench", "layer", *TINY, "--workload", "W2", "--hot", "2", "--json", cwd=tmp_path
    )
    report = json.loads(found.stdout)
    assert [row["name"] for row in report["rows"]] == ["gemms", "dmoe", "dmoe, W0"]
    assert (report["shape"]["workload"], report["shape"]["hot"]) == ("W2", 2)
    router = forced_router("W2", 2.0, 4, 2)
    made, _ = contenders(Shape(64, 16, 16, 4, 2), "fp32", "cpu", workload=router)
    with mock.patch.object(MoE, "forward", autospec=True, side_effect=MoE.forward) as forward:
        made["dmoe"].run()
    layer, x, context = forward.call_args.args
    assert sorted(layer(x, context).stats.kept_E.tolist())[-1] == 2 * 64 * 2 / 4


def test_a_step_is_measured_under_a_workload(tmp_path: Path) -> None:
    """Transformers has a router of its own, so it has no row."""
    with mock.patch("dmoe.bench.step.run", return_value={"rows": [{"name": "dmoe"}]}) as run:
        run_in_process("bench", "step", "--workload", "W3", "--experts", "12", cwd=tmp_path)
    forced = ["kind=workload", "workload=W3", "ranks=6", "hot=1.6"]
    assert run.call_args.kwargs["overrides"] == [f"moe.router.{value}" for value in forced]
    assert run.call_args.kwargs["names"] == ("gemms", "dmoe")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("layer --workload W9", "--workload=W9: must be one of W0"),
        ("layer --workload W2 --hot 9", "--hot=9.0: must be at most 8"),
        ("step --workload W2 --hot 0.5", "--hot=0.5: must be 1 or more"),
        ("layer --workload W1 --experts 7 --top-k 7", "--hot=1.6: must be at most 1,"),
    ],
)
def test_a_workload_that_no_layer_can_have(options: str, says: str, tmp_path: Path) -> None:
    wrong = run_in_process("bench", *options.split(), cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert says in wrong.stderr


@pytest.mark.ranks
def test_the_exchange_is_measured_on_two_ranks() -> None:
    report = run_exchange(Shape(64, 16, 16, 4, 2), rounds=1, capacity=1.5)
    rows = {row["name"]: row for row in report["rows"]}
    assert {"gemms", "packed", "padded", "exchange"} <= rows.keys()
    assert 0 < rows["packed"]["sent_mb"] <= 4 * 64 * 16 * 4 / 1e6
    names = {f"packed + {name}" for name in ("overlap", "once per rank", "bf16 wire")}
    assert report["faster_than_without"].keys() >= {*names, "padded + overlap"}
    assert rows["packed + overlap"]["sent_mb"] == rows["packed"]["sent_mb"]
    assert rows["packed + bf16 wire"]["of_least"] < rows["packed"]["of_least"]
    assert rows["packed"]["of_least"] >= 1
    peers = [name for name in OVER_RANKS if name not in report["left_out"]]
    assert list(report["faster_than"]) == [
        f"{name}, {own}" for own in ("packed", "padded") for name in peers
    ]


def test_the_balance_of_every_workload(tmp_path: Path) -> None:
    """Two copies reach the oracle; no setting is below it, none but periodic is above fixed."""
    rows = run_balance(Shape(64, 16, 16, 8, 2), ranks=(2, 4), rounds=0)["rows"]
    found = {row["name"]: row for row in rows}
    assert len(found) == 2 * 8 * 5
    for ep in (2, 4):
        for n in range(8):
            oracle, fixed, copies = (
                found[f"EP {ep} W{n} {name}"]["max_over_mean"]
                for name in ("oracle", "fixed", "copies 2")
            )
            assert oracle <= copies <= fixed
            assert copies <= oracle * 1.05
    hot = found["EP 2 W2 copies 2"]
    # rows of the 32 tokens that a rank keeps are not sent; each copy is 3 x 16 x 16 numbers
    assert hot["rows"] == 64
    assert hot["copies"] >= 1
    wrong = dmoe("bench", "balance", "--ranks", "3", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--ranks=3: must be numbers" in wrong.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--ranks", "8,2", "--hot", "4"],
            "--hot=4.0: must be at most 2, the smaller of --ranks=2",
        ),
        (["--ranks", "2", "--top-k", "9"], "--top-k=9: must be at most 8, the experts of W5"),
        (["--ranks", "2", "--experts", "7"], "--ranks=2: must be numbers from 2 up that divide 7"),
    ],
)
def test_a_workload_that_cannot_be_is_refused_before_any_is_measured(
    options: list[str], says: str, tmp_path: Path
) -> None:
    """EP 8 was measured before EP 2 was refused, by fields that the command does not have.

    And where no EP size could be had, the fix was the value that was refused.
    """
    wrong = run_in_process("bench", "balance", *options, cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert says in wrong.stderr
    assert "moe." not in wrong.stderr
    assert f"use {options[1]}\n" not in wrong.stderr


@pytest.mark.ranks
def test_the_balance_is_timed_on_two_ranks() -> None:
    rows = run_balance(Shape(64, 16, 16, 8, 2), ranks=(2,), workloads=("W2",), rounds=1)["rows"]
    assert {row["name"]: "ms" in row for row in rows} == {
        f"EP 2 W2 {name}": name in ("fixed", "copies 2")
        for name in ("fixed", "periodic", "copies 1", "copies 2", "oracle")
    }


@pytest.mark.slow
def test_a_step_is_compared_with_its_products(tmp_path: Path) -> None:
    sizes = (
        "--dim",
        "16",
        "--layers",
        "1",
        "--experts",
        "4",
        "--hidden",
        "8",
        "--vocabulary",
        "64",
    )
    more = ("--batch", "2", "--length", "8", "--rounds", "1", "--dtype", "fp32", "--json")
    report = json.loads(
        run_in_process(
            "bench", "step", *sizes, *more, "--set", "model.heads=2", cwd=tmp_path
        ).stdout
    )
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows)[:2] == ["gemms", "dmoe"]
    assert rows["dmoe"]["peak_mb"] > rows["gemms"]["peak_mb"] > 0
    assert report["shape"]["dim"] == 16
    assert report["shape"]["length"] == 8
    if "transformers" in rows:
        for shape in SHAPES.values():  # the same work: as many numbers in every kind of weight
            config = our_config(shape, "fp32", "cpu", [])
            with torch.device("meta"):
                ours = Transformer(config.model, config.moe, shape.vocabulary)
                theirs = their_model(shape)
            assert ours.num_parameters().total == sum(p.numel() for p in theirs.parameters())
    wrong = dmoe("bench", "step", "--set", "train.recompute=all", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "train.recompute=all: must be" in wrong.stderr
