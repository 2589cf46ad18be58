"""Instruction data in the trainer: the loss and its gradient do not depend on how a batch is cut.

Sequences have unequal numbers of answers, and the ranks of targets, so a mean of means is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dmoe
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.data import open_data
from dmoe.distributed.init import init_distributed
from dmoe.distributed.local_ranks import run_ranks
from dmoe.models.base import IGNORE_INDEX
from dmoe.runs.metrics_log import read_metrics
from dmoe.train.engine import build_engine
from dmoe.train.evaluation import evaluate
from dmoe.train.step import compute_gradients, training_batches
from tests.tiny import SMALL, VOCAB

PLAIN = ("data.format=instruct", "moe.balance.switch=0", "moe.balance.z=0", "train.seed=2")


def config(*more: str) -> Config:
    return load(None, [*SMALL, *PLAIN, *more])


def gradients_of(rank: int, world: int, options: Config) -> dict[str, Any]:
    """Return loss, counts, evaluation and dense gradients of the first step, in float64."""
    engine = build_engine(options, init_distributed("cpu"), VOCAB, torch.float64)
    data = engine.task.open_data()
    batches = training_batches(data.train, engine, 0)
    totals = compute_gradients(engine, batches)
    grads = {
        name: p.grad.numpy().copy()
        for name, p in engine.model.named_parameters()
        if p.grad is not None and ".experts." not in name
    }
    result = evaluate(engine, data)
    return {
        "own targets": [int((b.target != IGNORE_INDEX).sum()) for b in batches],
        "totals": (totals.loss, totals.num_targets, totals.num_tokens),
        "choices": [layer.choice_counts for layer in totals.layers],
        "gradients": grads,
        "evaluation": (result.loss, result.targets, result.metrics["bits_per_byte"]),
    }


def naive() -> tuple[dict[str, Tensor], float, int, int]:
    """Return gradients, loss, targets and tokens of the global batch at once, target by target."""
    engine = build_engine(config(), init_distributed("cpu"), VOCAB, torch.float64)
    samples = engine.task.training_samples(engine.task.open_data().train, 0, 0, 8, 8)
    engine.model.train()
    logits = engine.model(samples.input, None, samples.context(noise_key=(0, 0))).logits
    losses = [
        -torch.log_softmax(logits[b, s], -1)[target]
        for b, row in enumerate(samples.target.tolist())
        for s, target in enumerate(row)
        if target != IGNORE_INDEX
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    assert samples.valid_BS is not None
    grads = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
    return grads, float(loss.detach()), len(losses), int(samples.valid_BS.sum())


def check_equal(found: dict[str, Any]) -> None:
    grads, *expected = naive()
    assert found["totals"] == pytest.approx(expected, rel=1e-12)
    for name, grad in found["gradients"].items():
        np.testing.assert_allclose(grad, grads[name].numpy(), rtol=1e-9, atol=1e-13)
    assert [sum(layer) for layer in found["choices"]] == [2 * expected[2]] * 2, "padding is routed"


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_accumulation_changes_nothing(micro_batch: int) -> None:
    found = gradients_of(0, 1, config(f"train.micro_batch={micro_batch}"))
    check_equal(found)
    assert len(set(found["own targets"])) > 1 or micro_batch == 8, "the test is blind"


@pytest.mark.ranks
def test_two_ranks_equal_one_process() -> None:
    alone = gradients_of(0, 1, config())
    for more in ((), ("train.micro_batch=2", "parallel.ep=1")):
        found = run_ranks(2, gradients_of, config(*more))
        assert found[0]["own targets"] != found[1]["own targets"], "the test is blind"
        for rank in found:
            check_equal(rank)
            assert rank["evaluation"] == pytest.approx(alone["evaluation"], rel=1e-12)


def test_an_evaluation_counts_answers_alone() -> None:
    options = config()
    found = gradients_of(0, 1, options)["evaluation"]
    held_out = open_data(options.data, options.train.seed).held_out
    predicted_BS = held_out.sample_masks(0, options.train.eval_sequences).predicted_BS
    assert predicted_BS is not None
    assert found[1] == predicted_BS.sum()
    # each token of synthetic text is a byte
    assert found[2] == pytest.approx(found[0] / np.log(2))


def test_a_run_counts_its_tokens_without_padding_and_goes_on_counting(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} plus one?", "completion": f"{n + 1}"} for n in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"data.source={tmp_path}/a.jsonl", "data.chat_template=chatml", "data.seq_len=170",
        "train.sample_prompt=3 plus one?", "train.sample_tokens=2", "train.log_every=1",
        f"train.run_dir={tmp_path}/run", "tracking.trackers=[]",
    )  # fmt: skip
    for steps in (2, 4):
        options = config(*settings, f"train.steps={steps}")
        dmoe.train(options, quiet=True)
    data = open_data(options.data, options.train.seed)
    total, lines = 0, list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    for step, line in enumerate(r for r in lines if r["event"] == "train"):
        valid_BS = data.train.masks(step, 0, 8, 8).valid_BS
        assert valid_BS is not None
        total += int(valid_BS.sum())
        assert line["tokens"] == total
        assert valid_BS.sum() < valid_BS.size
    assert step == 3
    sample = next(r["sample"] for r in lines if r["event"] == "end" and "sample" in r)
    assert sample.startswith("<|im_start|>user\n3 plus one?<|im_end|>\n<|im_start|>assistant\n")
