"""Prepared with two workers, trained on 2 ranks, killed, resumed on 1: the same samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmoe.config.schema import DataConfig
from dmoe.data import prepare_shards
from tests.data.conftest import text_of_file
from tests.drills.jobs import losses, start

pytestmark = pytest.mark.drills


def test_a_run_on_shards_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """The small copy of what was done once with 1 GB. Documents are apart, domains weighted."""
    records = [{"text": text_of_file(n, 60), "of": "ab"[n % 2]} for n in range(80)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    config = DataConfig(source=str(tmp_path / "books.jsonl"), label_field="of")
    shards = tmp_path / "shards"
    prepare_shards(config, shards, shard_tokens=9000, workers=2, part_bytes=5000)
    data = (f"data.source={shards}", "data.weights={a: 1, b: 2}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    outcome = start(whole, *data, ranks=2)
    assert outcome.code == 0, outcome.errors[-3000:]
    assert "documents do not see each other" in outcome.output
    assert start(cut, *data, ranks=2, fault="kill@step rank=0 step=7").code != 0
    outcome = start(cut, *data, "parallel.virtual_ranks=2", ranks=1)
    assert outcome.code == 0, outcome.errors[-3000:]
    expected, found = losses(whole), losses(cut)
    assert found.keys() == expected.keys()
    assert len(found) == 12
    for step, loss in found.items():
        assert abs(float.fromhex(loss) - float.fromhex(expected[step])) < 1e-6, step
