"""`dmoe sweep`: a directory of runs and one table; it goes on after a stop and after a failure."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from dmoe.cli.sweep import plan
from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from tests.cli.commands import SMALL, dmoe, environment, refused
from tests.forked import ForkedProcess
from tests.json_lines import json_lines


def test_every_combination_is_a_run() -> None:
    runs = plan(["switch", "moe.num_experts=8,16", "train.steps=5", "train.seed=0,1,2"])
    assert [run.name for run in runs] == [
        f"num_experts={experts},seed={seed}" for experts in (8, 16) for seed in (0, 1, 2)
    ]
    assert len({run.arguments for run in runs}) == 6
    config = load(None, runs[-1].arguments[1:])
    assert (config.moe.num_experts, config.train.steps, config.train.seed) == (16, 5, 2)


def test_a_comma_inside_brackets_or_quotes_is_part_of_a_value() -> None:
    runs = plan(["tracking.trackers=[wandb,tensorboard],[]", "train.sample_prompt='a,b',c d"])
    assert [run.arguments for run in runs][::3] == [
        ("tracking.trackers=[wandb,tensorboard]", "train.sample_prompt='a,b'"),
        ("tracking.trackers=[]", "train.sample_prompt=c d"),
    ]
    assert [run.name for run in runs][3] == "trackers=_,sample_prompt=c_d"


def test_fields_that_end_alike_keep_their_whole_names() -> None:
    runs = plan(["moe.router.kind=top_k,noisy", "moe.experts.kind=relu,swiglu"])
    assert runs[0].name == "moe.router.kind=top_k,moe.experts.kind=relu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.steps=5"], "varies no field"),
        (["moe.top_k=1,2", "moe.top_k=3"], "is given twice"),
        (["moe.top_k=3", "moe.top_k=1,2"], "is given twice"),
        (["moe.top_k=1,1"], "one value twice"),
        (["train.run_dir=a,b"], "with --dir"),
        ([f"train.seed={','.join(map(str, range(1001)))}"], "gives 1001 runs"),
        (["moe.top_k=1,2", "quickstart"], "put CONFIG first"),
    ],
)
def test_what_cannot_be_swept_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(arguments)
    assert words in str(caught.value)


def test_a_wrong_value_is_refused_before_any_run(tmp_path: Path) -> None:
    refused(dmoe("sweep", *SMALL, "moe.top_k=2,99", "--dir", "s", cwd=tmp_path), "moe.top_k=99")
    assert not list(tmp_path.iterdir())


@pytest.mark.ranks
def test_a_sweep_is_stopped_goes_on_and_ends_with_a_table(tmp_path: Path) -> None:
    """Six runs were a loop in a shell, started again by hand after every stop."""
    # data that one of the runs cannot have: the other runs must not suffer
    (tmp_path / "small.txt").write_text("x" * 10)
    source = "data.source=synthetic:zipf,small.txt"
    command = ["sweep", *SMALL, "train.steps=4", "train.eval_every=0", source, "--dir", "s"]
    result = dmoe(*command, "--jobs", "2", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "source=small.txt failed; see s/source=small.txt.log" in result.stderr
    assert "source=synthetic_zipf: done" in result.stdout
    assert "bits/byte" in result.stdout
    assert "data.holdout=0.05: must cut" in (tmp_path / "s" / "source=small.txt.log").read_text()

    seeds = ["sweep", *SMALL, "train.steps=100000", "train.log_every=1", "train.eval_every=0"]
    seeds += ["train.seed=0,1", "--dir", "t"]
    process = ForkedProcess("dmoe", seeds, tmp_path, environment())
    log = tmp_path / "t" / "seed=0" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and '"train"' in log.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "to go on after a stop: dmoe sweep" in output
    assert "seed=1: started" not in output
    stopped = json_lines(log)[-1]
    assert stopped["stopped"] is True

    steps = stopped["step"] + 1
    seeds[seeds.index("train.steps=100000")] = f"train.steps={steps}"
    seeds[seeds.index("train.seed=0,1")] = "train.seed=0,0"
    refused(dmoe(*seeds, cwd=tmp_path), "one value twice")
    seeds[seeds.index("train.seed=0,0")] = "train.seed=0,1"
    result = dmoe(*seeds, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "seed=0: started" in result.stdout
    result = dmoe(*seeds, cwd=tmp_path)
    assert [line for line in result.stdout.splitlines() if line.endswith("done before")] == [
        "seed=0: done before",
        "seed=1: done before",
    ]
