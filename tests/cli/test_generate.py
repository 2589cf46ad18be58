"""Command `dmoe generate`, from runs of one process and of two ranks."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from tests.cli.commands import dmoe, refused, run_in_process
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


def test_batch_file_stop_and_json(alone: Run, place: Path) -> None:
    """Several prompts give what each gives alone; a file may hold JSON; a stop string cuts."""
    greedy = ("--temperature", "0", "--tokens", "12")
    (place / "prompts.txt").write_text('def \n\n{"prompt": "x\\ny"}\n', encoding="utf-8")
    options = ("--prompts-file", "prompts.txt", "--prompt", "# file", *greedy)
    result = run_in_process("generate", "alone", *options, "--json", cwd=place)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["# file", "def ", "x\ny"]
    for line in lines:
        alone_text = run_in_process(
            "generate", "alone", "--prompt", line["prompt"], *greedy, cwd=place
        ).stdout
        assert alone_text == line["prompt"] + line["text"] + "\n"
    text = lines[0]["text"]
    assert lines[0]["tokens"] == 12
    stop = text[5]
    cut = run_in_process(
        "generate", "alone", "--prompt", "# file", *greedy, "--stop", stop, "--json", cwd=place
    )
    found = json.loads(cut.stdout)
    assert (found["text"], found["ended_by"]) == (text[: text.index(stop)], stop)
    plain = run_in_process("generate", "alone", *options, "--batch", "2", cwd=place).stdout
    assert "--- prompt 3 of 3\nx\ny" in plain
    assert f"# file{text}\n--- prompt 2" in plain


def chatml(*messages: str) -> str:
    """Write messages of user and assistant in turn, up to where an answer begins."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in zip(roles, messages, strict=False)
    ]
    return "".join(turns) + "<|im_start|>assistant\n"


def test_chat_writes_prompts_by_the_template(
    alone: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As messages, and as the lines of stdin, whose turns see the turns before."""
    greedy = ("--temperature", "0", "--tokens", "9")

    def answer(*messages: str) -> str:
        plain = ("--prompt", chatml(*messages), "--stop", "<|im_end|>", "--json")
        result = run_in_process("generate", "alone", *plain, *greedy, cwd=place)
        return json.loads(result.stdout)["text"]

    chat = ("generate", "alone", "--chat", "--chat-template", "chatml", *greedy)
    result = run_in_process(*chat, "--prompt", "hi", "--prompt", "ho", "--json", cwd=place)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["text"] for line in found] == [answer("hi"), answer("ho")]
    assert run_in_process(*chat, "--prompt", "hi", cwd=place).stdout == answer("hi") + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nmore\n"))
    result = run_in_process(*chat, cwd=place)
    first = answer("hi")
    assert result.stdout == f"{first}\n{answer('hi', first, 'more')}\n"
    for options, words in (
        (("--chat", "--prompt", "hi"), ("data.chat_template", "chatml")),
        (("--prompt", "hi", "--chat-template", "chatml"), ("--chat-template", "--chat")),
    ):
        refused(run_in_process("generate", "alone", *options, cwd=place), *words)


def test_wrong_prompts_are_refused(alone: Run, place: Path) -> None:
    (place / "broken.jsonl").write_text('{"promt": "x"}\n', encoding="utf-8")
    for options, words in (
        ((), ("--prompt", "--prompts-file FILE")),
        (("--prompts-file", "missing.txt"), ("--prompts-file=missing.txt", "cannot be read")),
        (("--prompts-file", "broken.jsonl"), ("broken.jsonl:1", "prompt")),
        (("--prompt", "a", "--stop", ""), ("--stop", "empty")),
    ):
        refused(run_in_process("generate", "alone", *options, cwd=place), *words)


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


def test_a_bare_prompt_to_a_model_of_conversations_is_noted(tmp_path: Path) -> None:
    """The model was asked something that no conversation begins with, without a word."""
    rows = [json.dumps({"prompt": f"{n} + 1?", "completion": str(n + 1)}) for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    small = ["model.dim=32", "model.layers=1", "moe.expert_dim=32", "data.seq_len=80"]
    data = ["data.source=sums.jsonl", "data.format=instruct", "data.chat_template=chatml"]
    run = ["train.steps=1", "train.global_batch=4", "train.run_dir=run", "train.sample_tokens=0"]
    trained = dmoe("train", *small, *data, *run, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    result = dmoe("generate", "run", "--prompt", "2 + 1?", "--tokens", "3", cwd=tmp_path)
    assert "--chat writes it as a message of the user" in result.stderr
