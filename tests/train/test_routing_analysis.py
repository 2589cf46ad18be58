"""Routing analysis of an evaluation, against loops over the recorded decisions of all ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.train import engine as engines
from dmoe.train.evaluation import evaluate
from dmoe.train.routing_analysis import RoutingProbe, mutual_information
from dmoe.verify.decisions import record_routing
from tests.ranks import run_ranks
from tests.tiny import tiny

pytestmark = pytest.mark.ranks

DOMAINS = ("first", "second", "third")


class Labelled:
    """A dataset whose sequences belong to three domains in turn."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.num_sequences, self.seq_len = stream, stream.num_sequences, stream.seq_len

    def samples(self, first: int, count: int) -> np.ndarray:
        return np.asarray(self.stream.samples(first, count))

    def sample_labels(self, first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count) % len(DOMAINS)


def evaluations(
    rank: int, world: int, config: Config, changed: bool
) -> tuple[list[Any], list[list[np.ndarray]], int]:
    """Evaluate twice, with changed routers in between.

    Returns `layers` of both, experts [layer][T, K] of each batch, and sequences per batch.
    """
    here = worlds.init_distributed("cpu")
    data = open_data(config.data, config.train.seed)
    held_out: Any = Labelled(data.held_out)
    data = replace(data, held_out=held_out, domains=DOMAINS)
    engine = engines.build_engine(config, here, data.tokenizer.vocab_size)
    probe, told, chosen = RoutingProbe(engine, data.domains), [], []
    layers = engine.model.moe_layers()
    for _ in range(2):
        with record_routing(layers) as (_, before):
            result = evaluate(engine, data, probe=probe)
        assert result is not None
        told.append(result.layers)
        chosen.append([routing.expert_TK.numpy().copy() for routing in before])
        if changed:
            with torch.no_grad():
                layers[0].router.weight.mul_(-1)
    return told, chosen, engine.sequences_per_forward


@pytest.mark.parametrize("world", [1, 2])
def test_counts_equal_the_loop(world: int) -> None:
    config = tiny(
        "train.eval_sequences=10", "train.micro_batch=2"
    )  # the last batch is partly padding
    ranks = run_ranks(world, evaluations, config, True)
    told, count = ranks[0][0], ranks[0][2]
    assert all(rank[0] == told for rank in ranks)
    experts, length = config.moe.num_experts, config.data.seq_len
    for which in range(2):
        for layer in range(2):
            pairs = np.zeros((experts, experts), dtype=int)
            domains, first = np.zeros((3, experts), dtype=int), np.zeros((3, experts), dtype=int)
            for rank, (_, chosen, _) in enumerate(ranks):
                for batch, start in enumerate(range(0, 10, world * count)):
                    for t, ids in enumerate(chosen[which][batch * 2 + layer]):
                        sequence = start + rank * count + t // length
                        if sequence >= 10:
                            continue
                        first[sequence % 3, ids[0]] += 1
                        for a in ids:
                            domains[sequence % 3, a] += 1
                            for b in ids:
                                pairs[a, b] += 1
            line = told[which][layer]
            assert line["layer"] == layer
            assert line["co_selection"] == pairs.tolist()
            assert line["domains"] == {
                name: row.tolist() for name, row in zip(DOMAINS, domains, strict=True)
            }
            assert line["mutual_information"] == pytest.approx(naive_information(first))


def naive_information(count: np.ndarray) -> float:
    """Compute H(domain) + H(expert) - H(both) in bits: another formula than the module's."""

    def entropy(counts: np.ndarray) -> float:
        return -sum(c / count.sum() * math.log2(c / count.sum()) for c in counts.flatten() if c)

    return entropy(count.sum(0)) + entropy(count.sum(1)) - entropy(count)


@pytest.mark.parametrize("world", [1, 2])
def test_stability(world: int) -> None:
    """Of the first batch, whatever the order of choices; absent at first, 0 if nothing changed."""
    config = tiny()
    calm = run_ranks(1, evaluations, config, False)[0][0]
    assert ["stability" in line for line in calm[0]] == [False, False]
    assert [line["stability"] for line in calm[1]] == [0.0, 0.0]
    ranks = run_ranks(world, evaluations, config, True)
    for layer in range(2):
        moved, tokens = 0, 0
        for _, (old, new), _ in ranks:
            for before, after in zip(old[layer], new[layer], strict=True):
                moved += set(before) != set(after)
                tokens += 1
        assert ranks[0][0][1][layer]["stability"] == moved / tokens
        assert layer == 1 or moved > tokens / 2


def test_one_domain_has_no_table(tmp_path: Path) -> None:
    config = tiny()
    data = open_data(config.data, 0)
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), data.tokenizer.vocab_size)
    result = evaluate(engine, data, probe=RoutingProbe(engine, data.domains))
    assert result is not None
    assert set(result.layers[0]) == {"layer", "co_selection"}
    assert evaluate(engine, data).layers == []  # type: ignore[union-attr]


def test_mutual_information() -> None:
    """Own experts for each of four domains: 2 bits. The same experts for all: 0. No counts: 0."""
    assert mutual_information(
        [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5]]
    ) == pytest.approx(2)
    assert mutual_information([[3, 6, 9], [1, 2, 3]]) == pytest.approx(0, abs=1e-12)
    assert mutual_information([[0, 0], [0, 0]]) == 0
