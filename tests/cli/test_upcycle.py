"""Command `dmoe checkpoint upcycle`: a dense run becomes a mixture that is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import dmoe, metrics
from tests.tiny import SMALL
from tests.train.dense_run import SPARSE, dense_run

pytestmark = pytest.mark.ranks

CONFIG = (*SMALL, *SPARSE, "train.steps=2", "train.log_every=1", "train.sample_tokens=0")


def test_upcycle_and_train(tmp_path: Path) -> None:
    dense_run(tmp_path / "dense")
    new = "train.run_dir=sparse"
    result = dmoe("checkpoint", "upcycle", "dense", *CONFIG, new, "--json", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    assert (content["step"], content["layers"]) == (
        5,
        ["blocks.0.feed_forward", "blocks.1.feed_forward"],
    )
    assert content["difference"] < 1e-4
    trained = dmoe("train", *CONFIG, new, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    lines = metrics(tmp_path / "sparse")
    start = next(line for line in lines if line["event"] == "start")
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2]
    assert start["parameters"] == content["parameters"] > 2 * content["dense_parameters"]
