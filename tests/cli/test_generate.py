"""Command `dmoe generate`, from runs of one process and of two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from tests.cli.commands import dmoe, refused
from tests.cli.conftest import Run

pytestmark = pytest.mark.ranks


def test_it_generates_the_sample_of_the_run(alone: Run, place: Path) -> None:
    """The sample at the end of training is drawn at temperature 0.7 with the run's seed."""
    sample = alone.stdout.split("sample:\n")[1].split("\nrun directory")[0].strip("\n")
    result = dmoe(
        "generate", "alone", "--prompt", "def ", "--temperature", "0.7", "--tokens", "20", cwd=place
    )
    assert result.returncode == 0, result.stderr
    assert sample.startswith(result.stdout.strip("\n")), (
        "the sample does not stop at the end of a document, `generate` does"
    )
    assert result.stdout.startswith("def ")
    assert result.stderr == ""


def test_one_process_generates_from_two_ranks_run(pair: Run, place: Path) -> None:
    result = dmoe(
        "generate",
        "runs/latest",
        "--prompt",
        "def é",
        "--tokens",
        "5",
        "--temperature",
        "0",
        cwd=place,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def é")


def test_step_option(alone: Run) -> None:
    weights = [
        restore_model(RunDir(alone.path), step).model.embedding.weight for step in (3, 6, None)
    ]
    assert weights[1].equal(weights[2])
    assert not weights[0].equal(weights[1])


def test_all_experts_of_two_ranks_are_loaded(pair: Run, pair_resumed_alone: Run) -> None:
    """Step 3 was saved by two ranks; the copy that one process resumed has the same files."""
    ours = restore_model(RunDir(pair.path), 3).model.state_dict()
    theirs = restore_model(RunDir(pair_resumed_alone.path), 3).model.state_dict()
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert all(value.isfinite().all() for value in ours.values())
    assert len(ours["blocks.0.feed_forward.experts.w_in"]) == 8


def test_missing_run_checkpoint_or_step(alone: Run, place: Path) -> None:
    refused(
        dmoe("generate", "nowhere", "--prompt", "a", cwd=place),
        "RUN=nowhere",
        "is not a run directory",
        "runs/latest",
    )
    empty = place / "without-checkpoints"
    shutil.copytree(alone.path, empty, ignore=shutil.ignore_patterns("step-*", "logs"))
    refused(
        dmoe("generate", str(empty), "--prompt", "a", cwd=place), "has no checkpoint yet", code=3
    )
    result = dmoe("generate", "alone", "--prompt", "a", "--step", "5", cwd=place)
    refused(result, "no checkpoint of step 5", "there are 3, 6", code=3)


def test_a_damaged_checkpoint_is_refused(alone: Run, place: Path) -> None:
    damaged = place / "damaged"
    shutil.copytree(alone.path, damaged, ignore=shutil.ignore_patterns("logs"))
    for shard in damaged.rglob("*.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    result = dmoe("generate", str(damaged), "--prompt", "a", "--step", "6", cwd=place)
    refused(result, "safetensors", code=3)


def test_a_model_of_conversations_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    """`dmoe generate` gave it the bare prompt, which no conversation begins with."""
    rows = [json.dumps({"prompt": f"{n} + 1?", "completion": str(n + 1)}) for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    small = ["model.dim=32", "model.layers=1", "moe.expert_dim=32", "data.seq_len=80"]
    data = ["data.source=sums.jsonl", "data.format=instruct", "data.chat_template=chatml"]
    run = ["train.steps=1", "train.global_batch=4", "train.run_dir=run", "train.sample_tokens=0"]
    trained = dmoe("train", *small, *data, *run, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = dmoe("generate", "run", "--prompt", "2 + 1?", "--tokens", "3", cwd=tmp_path)
    assert result.stdout.startswith(
        "<|im_start|>user\n2 + 1?<|im_end|>\n<|im_start|>assistant\n"
    ), result.stderr
