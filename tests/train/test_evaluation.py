"""Evaluation: total, per domain and without a stream, recomputed sample by sample from logits."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmoe.config.schema import Config
from dmoe.distributed import init as worlds
from dmoe.moe.routing import TokenContext
from dmoe.runs.directory import RunDir
from dmoe.train import engine as engines
from dmoe.train.evaluation import Evaluation, evaluate
from dmoe.train.run_session import RunSession
from dmoe.train.signals import StopRequested
from dmoe.train.tasks import Score, task_of
from tests.ranks import run_ranks
from tests.tiny import tiny

CLUSTERS = (
    "train.task=classification",
    "data.source=synthetic:clusters",
    "data.streams=[a,b]",
    "train.eval_sequences=37",  # the last batch is partly padding
)
GATED = (
    *CLUSTERS,
    "model.fusion=gated",
    "model.layers=1",
    "moe.num_experts=2",
    "moe.top_k=1",
    "moe.router.kind=fixed",
    "moe.balance.switch=0",
    "moe.balance.z=0",
)


def evaluation(rank: int, world: int, config: Config) -> Evaluation:
    task = task_of(config)
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), task.num_outputs)
    result = evaluate(engine, task.open_data())
    assert result is not None
    return result


def naive_scores(config: Config, without: str | None = None) -> dict[int, Score]:
    """Score each label, one sample at a time, in one process; bytes are counted from tokens."""
    task = task_of(config)
    data, model = task.open_data(), task.build_model()
    model.initialize(config.train.seed)
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0] * 4)
    for row in range(
        min(config.train.eval_sequences, data.held_out.num_sequences or config.train.eval_sequences)
    ):
        input, target, label_B, *_ = task.samples(data.held_out, row, 1)
        input = input if without is None else task.mask_stream(input, without)
        with torch.no_grad():
            logits = model.eval()(
                input, context=TokenContext(label_T=label_B.repeat_interleave(target.shape[1]))
            ).logits[0]
        for logit_V, wanted in zip(logits.double(), target[0].tolist(), strict=True):
            total = sums[int(label_B)]
            total[0] += float(logit_V.logsumexp(0) - logit_V[wanted])
            total[1] += 1
            total[2] += (
                len(data.tokenizer.decode([wanted]).encode()) if hasattr(data, "tokenizer") else 0
            )
            total[3] += int(logit_V.argmax()) == wanted
    return {label: Score(*total) for label, total in sums.items()}


def text(path: Path) -> Config:
    """Write two ASCII domains of different size: each token is one byte of text."""
    for name, count in (("long", 40), ("short", 9)):
        (path / name).mkdir()
        for number in range(count):
            (path / name / f"{number}.txt").write_text(f"{name} text {number} " * (8 + number))
    return tiny(
        f"data.source={path}/long,{path}/short", "data.holdout=0.3", "train.eval_sequences=23"
    )


@pytest.mark.parametrize("world", [1, 2])
def test_domains_equal_a_loop(world: int, tmp_path: Path) -> None:
    config = text(tmp_path)
    found = run_ranks(world, evaluation, config)
    expected = naive_scores(config)
    assert all(result == found[0] for result in found)
    assert list(found[0].by_domain) == ["long", "short"]
    for label, name in enumerate(found[0].by_domain):
        told, score = found[0].by_domain[name], expected[label]
        assert told["tokens"] == score.targets
        assert told["loss"] == pytest.approx(score.loss, rel=1e-5)
        assert told["bits_per_byte"] == pytest.approx(
            score.loss_sum / score.target_bytes / math.log(2), rel=1e-5
        )
    nats, tokens = (
        sum(getattr(score, part) for score in expected.values()) for part in ("loss_sum", "targets")
    )
    assert found[0].targets == tokens
    assert found[0].loss == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
def test_classes_and_missing_streams_equal_a_loop(world: int) -> None:
    config = tiny(*GATED)
    found = run_ranks(world, evaluation, config)[0]
    expected = naive_scores(config)
    whole = Score(
        *(
            sum(getattr(s, part) for s in expected.values())
            for part in ("loss_sum", "targets", "target_bytes", "correct")
        )
    )
    assert found.loss == pytest.approx(whole.loss, rel=1e-5)
    assert found.metrics == {"accuracy": pytest.approx(whole.correct / whole.targets)}
    assert {name: told["accuracy"] for name, told in found.by_domain.items()} == {
        str(label): pytest.approx(score.correct / score.targets)
        for label, score in sorted(expected.items())
    }
    for stream in ("a", "b"):
        less = naive_scores(config, stream).values()
        assert found.missing_stream_accuracy[stream] == pytest.approx(
            sum(score.correct for score in less) / whole.targets
        )


def test_a_single_domain_is_not_repeated() -> None:
    found = run_ranks(1, evaluation, tiny())[0]
    assert found.by_domain == {}
    assert "by_domain" not in found.record()
    assert "missing" not in found.record()


@pytest.mark.parametrize("batches", [0, 2, 7])
def test_a_stop_request_ends_an_evaluation(batches: int) -> None:
    """Also during the passes without a stream, which follow the five batches of the first pass."""
    config = tiny(*GATED)
    engine = engines.build_engine(
        config, worlds.init_distributed("cpu"), task_of(config).num_outputs
    )
    left = iter([False] * batches)
    with pytest.raises(StopRequested):
        evaluate(engine, engine.task.open_data(), lambda: next(left, True))
    assert next(left, None) is None
    assert engine.wrapped_model.training


@pytest.mark.parametrize(
    ("told", "first", "due"), [((), True, True), ((0,), True, True), ((), False, False)]
)
def test_evaluation_at_step_0_is_repeated_by_a_new_start(
    told: tuple[int, ...], first: bool, due: bool, tmp_path: Path
) -> None:
    """A job that was killed before the first checkpoint starts anew, maybe with another seed.

    Once its evaluation at step 0 counted as done, and the result table showed the other weights'.
    """
    run = RunSession(RunDir(tmp_path), worlds.init_distributed("cpu"), None)
    for step in told:
        run.directory.metrics.write_text(f'{{"event": "eval", "step": {step}, "time": 1.0}}\n')
    assert run.is_evaluation_missing(0, replace(tiny().train, eval_first=first)) == due
