"""Evaluation order: the domains alternate, text and shards agree, one domain per sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data, prepare_shards
from dmoe.data.packing import PackedDataset
from dmoe.data.sequences.held_out import EvaluationOrder, HeldOutDataset

RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=6)
"""(domain, tokens)."""


def naive(runs: list[tuple[int, int]], seq_len: int) -> list[tuple[int, int]]:
    """(begin, label) by walking along each domain, then taking one of each domain in turn."""
    waiting: dict[int, list[int]] = {}
    position = 0
    for label, tokens in runs:
        begin = position
        while begin + seq_len <= position + tokens:
            waiting.setdefault(label, []).append(begin)
            begin += seq_len
        position += tokens
    found = []
    while any(waiting.values()):
        found += [(waiting[label].pop(0), label) for label in sorted(waiting) if waiting[label]]
    return found


@settings(max_examples=150, deadline=None)
@given(RUNS, st.integers(1, 9))
def test_one_of_each_domain_in_turn(drawn: list[tuple[int, int]], seq_len: int) -> None:
    runs = [item for i, item in enumerate(drawn) if i == 0 or drawn[i - 1][0] != item[0]]
    edges = np.cumsum([0, *(tokens for _, tokens in runs)]).tolist()
    marks = tuple((begin, label) for begin, (label, _) in zip(edges, runs, strict=False))
    order, expected = EvaluationOrder(marks, edges[-1] + 1, seq_len), naive(runs, seq_len)
    assert order.num_sequences == len(expected)
    begin_N, label_N = order.sequences_at(np.arange(len(expected)))
    assert list(zip(begin_N.tolist(), label_N.tolist(), strict=True)) == expected
    assert set(order.label_D.tolist()) == {label for _, label in expected}


def test_one_domain_is_read_as_it_is_stored() -> None:
    """With one domain, metrics are those from before the order was changed."""
    text = PackedDataset([np.arange(500, dtype="<u4")], 7, 0, 500, "held_out")
    held_out = HeldOutDataset(text)
    assert held_out.num_sequences == text.num_sequences
    assert np.array_equal(held_out.samples(0, 71), text.samples(0, 71))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Three domains whose letters are their own: a has ten times the text of b, and c one file."""
    for letters, files in (("abcdef", 60), ("ghijkl", 12), ("mnopqr", 12)):
        folder = tmp_path / "texts" / letters[0]
        folder.mkdir(parents=True)
        for number in range(files):
            (folder / f"{number}.txt").write_text(
                "".join(letters[(number * 5 + i * i) % 6] for i in range(500)) + f"{number}"
            )
    root = tmp_path / "texts"
    return DataConfig(source=f"{root}/m,{root}/g,{root}/a", seq_len=32, holdout=0.3)


def test_a_few_sequences_reach_every_domain(config: DataConfig) -> None:
    """In stored order, a short evaluation read one domain only and had no metric of the others."""
    data = open_data(config, 0)
    assert data.domains == ("a", "g", "m")
    for count in (3, 12, 60):
        assert np.bincount(data.held_out.sample_labels(0, count)).tolist() == [count // 3] * 3
    _, of_each = zip(*data.sequences_per_domain().values(), strict=True)
    assert of_each[0] > 3 * of_each[1]
    assert np.bincount(
        data.held_out.sample_labels(0, data.held_out.num_sequences or 0)
    ).tolist() == list(of_each)


def test_a_sequence_is_of_one_domain(config: DataConfig) -> None:
    data = open_data(config, 0)
    count = data.held_out.num_sequences or 0
    for row, label in zip(
        data.held_out.samples(0, count), data.held_out.sample_labels(0, count), strict=True
    ):
        letters = {letter for letter in data.tokenizer.decode(row) if letter.isalpha()}
        assert letters <= set(("abcdef", "ghijkl", "mnopqr")[label])


def test_the_order_does_not_depend_on_the_seed(config: DataConfig) -> None:
    one, other = open_data(config, 0), open_data(config, 1)
    assert np.array_equal(one.held_out.samples(0, 40), other.held_out.samples(0, 40))


def test_shards_are_evaluated_in_the_same_order(config: DataConfig, tmp_path: Path) -> None:
    prepare_shards(config, tmp_path / "shards", shard_tokens=700)
    more = tmp_path / "more.txt"
    more.write_text("stuvwx" * 50)
    for evaluated in (None, str(more)):
        text = open_data(replace(config, eval_source=evaluated), 3)
        shards = open_data(
            replace(
                config, source=str(tmp_path / "shards"), document_mask=False, eval_source=evaluated
            ),
            3,
        )
        count = text.held_out.num_sequences or 0
        assert shards.held_out.num_sequences == count
        assert shards.domains == text.domains == ("a", "g", "m", *(("more",) if evaluated else ()))
        assert shards.eval_only == text.eval_only
        assert np.array_equal(shards.held_out.samples(0, count), text.held_out.samples(0, count))
        assert np.array_equal(
            shards.held_out.sample_labels(0, count), text.held_out.sample_labels(0, count)
        )
        assert shards.fingerprint == text.fingerprint


def test_text_that_is_only_evaluated_comes_back_whole(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("stuvwx" * 50)
    data = open_data(replace(config, eval_source=str(tmp_path / "s.txt")), 0)
    count = data.held_out.num_sequences or 0
    rows = data.held_out.samples(0, count)[
        data.held_out.sample_labels(0, count) == data.domains.index("s")
    ]
    assert data.tokenizer.decode(rows[:, 1:].ravel()) == ("stuvwx" * 50)[: 300 // 32 * 32]
    assert rows[0, 0] == data.tokenizer.separator


def test_a_domain_with_too_little_text_is_named(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("tiny")
    data = open_data(replace(config, eval_source=str(tmp_path / "tiny.txt")), 0)
    assert "too little held-out text to evaluate tiny" in data.describe()
    assert data.sequences_per_domain()["tiny"] == (0, 0)


def test_held_out_text_without_a_whole_sequence_is_refused() -> None:
    text = PackedDataset([np.arange(20, dtype="<u4")], 12, 0, 20, "held_out", ((0, 0), (10, 1)))
    with pytest.raises(
        ConfigError,
        match=r"data.seq_len=12: must be less than the tokens of some domain of the held_out split",
    ):
        HeldOutDataset(text)
