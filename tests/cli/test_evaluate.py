"""Command `dmoe evaluate`: what the training logged, on any ranks, and other text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import dmoe
from dmoe.data import open_tokenizer
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from tests.cli.commands import dmoe as command
from tests.cli.commands import metrics, refused, run_in_process
from tests.cli.conftest import TEXT, Run

pytestmark = pytest.mark.ranks


def evaluated(*arguments: str, cwd: Path) -> dict[str, Any]:
    result = run_in_process("evaluate", *arguments, "--json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def logged(run: Run, step: int) -> dict[str, Any]:
    return next(
        line for line in metrics(run.path) if line["event"] == "eval" and line["step"] == step
    )


def test_it_gives_what_the_training_logged(alone: Run, place: Path) -> None:
    """To the last bit, for both checkpoints; from Python too, and with all tokens counted."""
    before = sorted(path for path in alone.path.rglob("*"))
    for options, step in ((("--checkpoint", "3"), 3), ((), 6)):
        found, line = evaluated("alone", *options, cwd=place), logged(alone, step)
        assert [found[key] for key in ("step", "loss", "bits_per_byte", "tokens")] == [
            line[key] for key in ("step", "loss", "bits_per_byte", "tokens")
        ]
        assert found["perplexity"] == math.exp(line["loss"])
        for layer in found["layers"]:
            assert sum(layer["load"]) == line["tokens"] * 2
            assert layer["drop_rate"] == 0
    result = dmoe.evaluate(alone.path, 3, sequences=4)
    assert result.loss != logged(alone, 3)["loss"]
    assert result.evaluation.targets == 4 * 16
    assert sorted(path for path in alone.path.rglob("*")) == before, "nothing is written"


def test_two_ranks_run_on_one_and_on_two_processes(pair: Run, place: Path) -> None:
    line, found = logged(pair, 6), evaluated(str(pair.path), cwd=place)
    assert found["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert found["tokens"] == line["tokens"]
    result = command("evaluate", str(pair.path), "--ranks", "2", "--json", cwd=place)
    assert result.returncode == 0, result.stderr
    both = json.loads(result.stdout)
    assert (both["loss"], both["bits_per_byte"]) == (line["loss"], line["bits_per_byte"])
    assert [layer["load"] for layer in both["layers"]] == [
        layer["load"] for layer in found["layers"]
    ]


def test_other_text_is_evaluated_whole(alone: Run, place: Path) -> None:
    """Loss and bytes are recomputed sequence by sequence, without dmoe's evaluation."""
    (place / "other.txt").write_text(TEXT[:400] + "é" * 50, encoding="utf-8")
    found = evaluated("alone", "--data", "other.txt", cwd=place)
    restored = restore_model(RunDir(alone.path))
    tokenizer = open_tokenizer(restored.config.data)
    ids = [tokenizer.separator, *tokenizer.encode((place / "other.txt").read_bytes()).tolist()]
    total = count = size = 0.0
    for start in range(0, len(ids) - 16, 16):
        window = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            logits = restored.model(window[:, :-1]).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += 16
        size += sum(int(tokenizer.token_bytes[token]) for token in window[0, 1:])
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    text = run_in_process("evaluate", "alone", "--data", "other.txt", cwd=place).stdout
    for words in ("step 6: other.txt: 1 file", "perplexity", "MoE layer", f"{found['loss']:.4f}"):
        assert words in text


def test_domains_and_classes(place: Path) -> None:
    """Several domains have a row each; a classifier has its accuracy."""
    small = ["model.dim=16", "model.layers=1", "model.heads=2", "train.device=cpu"]
    small += ["moe.expert_dim=8", "train.steps=1", "train.global_batch=4", "optim.warmup=0"]
    small += ["tracking.trackers=[]", "train.sample_tokens=0", "train.eval_sequences=6"]
    for name in ("left", "right"):
        (place / name).mkdir(exist_ok=True)
        for part in range(3):
            (place / name / f"{part}.txt").write_text(f"{name} {part} " * 90, encoding="utf-8")
    source = f"data.source={place / 'left'},{place / 'right'}"
    text = [*small, source, "data.holdout=0.5", "data.seq_len=16", "train.run_dir=domains"]
    table = [*small, "train.task=classification", "data.source=synthetic:clusters"]
    for arguments in (text, [*table, "train.run_dir=classes"]):
        result = run_in_process("train", *arguments, "--quiet", cwd=place)
        assert result.returncode == 0, result.stderr
    line, found = metrics(place / "domains")[-2], evaluated("domains", cwd=place)
    line = next(line for line in metrics(place / "domains") if line["event"] == "eval")
    assert set(found["by_domain"]) == {"left", "right"}
    for name, values in line["by_domain"].items():
        assert {key: found["by_domain"][name][key] for key in values} == values
        assert found["by_domain"][name]["perplexity"] == math.exp(values["loss"])
    line = next(line for line in metrics(place / "classes") if line["event"] == "eval")
    found = evaluated("classes", cwd=place)
    assert (found["accuracy"], found["loss"]) == (line["accuracy"], line["loss"])
    assert "perplexity" not in found
    refused(
        run_in_process("evaluate", "classes", "--data", "other.txt", cwd=place), "--data=other.txt"
    )


def test_what_cannot_be_evaluated_is_refused(alone: Run, place: Path) -> None:
    for options, words in (
        (("nowhere",), ("RUN=nowhere",)),
        (("alone", "--data", "missing.txt"), ("--data=missing.txt",)),
        (("alone", "--sequences", "0"), ("1 or more",)),
    ):
        refused(run_in_process("evaluate", *options, cwd=place), *words)
    result = run_in_process("evaluate", "alone", "--checkpoint", "5", cwd=place)
    refused(result, "no checkpoint of step 5", code=3)
