"""Fault 29: resuming with another config.

Fields about speed and frequency may change. Fields that define the run need
`checkpoint.accept_changes`. Fields that change the shapes of tensors are refused.
"""

from __future__ import annotations

import base64
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dmoe.checkpoint import read_manifest, save
from dmoe.checkpoint.manifest import step_name
from dmoe.checkpoint.rng_state import gather_rng_state
from dmoe.config.load import load
from dmoe.data import open_data
from dmoe.distributed import init as worlds
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import read_metrics
from dmoe.train import engine as engines
from dmoe.train.checkpointer import Checkpointer, train_state
from dmoe.train.step_guard import StepGuard
from tests.drills.jobs import DRILL
from tests.drills.two_ranks import STEPS, trained
from tests.drills.worker import RankOutcome, run_ranks, train_with_fault

pytestmark = pytest.mark.drills

CHECKPOINT = 3


def text(path: Path, seed: int) -> str:
    path.write_text(
        "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=1430)),
        encoding="utf-8",
    )
    return f"data.source={path}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (text(tmp_path_factory.mktemp("corpus") / "text.txt", 0), "data.holdout=0.1")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, corpus: tuple[str, ...]) -> Path:
    return trained(tmp_path_factory.mktemp("original") / "run", *corpus, ranks=1)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """Copy the run as it was after step 4."""
    run = shutil.copytree(original, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / step_name(8))
    return run


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer of the bytes in another order: the same number of tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "other.tiktoken"
    lines = [f"{base64.b64encode(bytes([255 - byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def resume(run: Path, corpus: tuple[str, ...]) -> Callable[..., RankOutcome]:
    """Return a function that resumes the run with additional overrides."""
    return lambda *overrides: run_ranks(1, train_with_fault, run, (*STEPS, *corpus, *overrides))[0]


def snapshot(run: Path) -> dict[str, bytes]:
    """Return the files that a refusal must not change."""
    kept = ("resolved.yaml", "config.yaml", "metrics.jsonl", "metrics.layers.bin")
    return {name: (run / name).read_bytes() for name in kept} | {
        path.name: b"" for path in (run / "checkpoints").iterdir()
    }


NEUTRAL = (
    "optim.lr=0.001",
    "optim.schedule=linear",
    "optim.warmup=0",
    "checkpoint.keep=5",
    "train.log_every=2",
    "guard.patience=3",
)


def test_neutral_fields_may_change(run: Path, resume: Callable[..., RankOutcome]) -> None:
    """Learning rate and schedule may change too: a common practice."""
    assert resume(*NEUTRAL) == RankOutcome(0, "")
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["resumed_from"] for line in lines if line["event"] == "restart"] == [4]
    assert [line["step"] for line in lines if line["event"] == "end"] == [8]
    assert (
        next(line["lr"] for line in lines if line["event"] == "train" and line["step"] == 6)
        <= 0.001
    )


CHANGED = {
    "train.global_batch": "4",
    "train.seed": "7",
    "moe.num_experts": "4",
    "moe.router.kind": "noisy",
    "moe.capacity.factor": "2.0",
    "model.dim": "64",
    "data.seq_len": "8",
}
"""Fields that define the run, and new values."""
MISFITS = {"moe.num_experts", "moe.router.kind", "model.dim"}
"""Fields that give the model other tensors: they cannot be accepted, and are not offered."""


@pytest.mark.parametrize("name", CHANGED)
def test_changes_of_the_run_are_refused_by_name_until_accepted(
    name: str, run: Path, resume: Callable[..., RankOutcome]
) -> None:
    change, before = f"{name}={CHANGED[name]}", snapshot(run)
    refused = resume(change)
    assert refused.code == CHECKPOINT
    assert refused.text.startswith(f"{change}: the checkpoint was trained with ")
    ending = "train.run_dir" if name in MISFITS else f"checkpoint.accept_changes=[{name}]"
    assert refused.text.endswith(ending)
    assert snapshot(run) == before
    accepted = resume(change, f"checkpoint.accept_changes=[{name}]")
    if name in MISFITS:
        assert accepted == refused
        assert snapshot(run) == before
    else:
        assert accepted == RankOutcome(0, "")
        assert max(line["step"] for line in read_metrics(run / "metrics.jsonl")) == 8


def test_another_corpus_and_another_tokenizer(
    run: Path, resume: Callable[..., RankOutcome], tmp_path: Path, ranks_file: Path
) -> None:
    """Accepting one of two changes does not accept the other; the suggested fix has both."""
    other, tokenizer = text(tmp_path / "other.txt", 1), f"data.tokenizer={ranks_file}"
    assert resume(other).text.endswith("checkpoint.accept_changes=[data.source]")
    assert resume(tokenizer).text.endswith("checkpoint.accept_changes=[data.tokenizer]")
    both = resume(other, tokenizer, "checkpoint.accept_changes=[data.source]")
    assert both.code == CHECKPOINT
    assert both.text.startswith(f"{tokenizer}: the checkpoint was trained with bytes")
    assert both.text.endswith("checkpoint.accept_changes=[data.source,data.tokenizer]")
    assert resume(other, "checkpoint.accept_changes=[data.source]") == RankOutcome(0, "")


def test_changed_content_of_the_corpus(
    run: Path, resume: Callable[..., RankOutcome], corpus: tuple[str, ...]
) -> None:
    path = Path(corpus[0].removeprefix("data.source="))
    content = path.read_bytes()
    try:
        path.write_bytes(content.replace(b"a", b"b"))
        refused = resume()
        assert refused.code == CHECKPOINT
        assert refused.text.startswith(
            f"{corpus[0]}: its content is not what the checkpoint was trained on"
        )
        assert resume("checkpoint.accept_changes=[data]") == RankOutcome(0, "")
    finally:
        path.write_bytes(content)


def save_changed_state(
    rank: int, world: int, run: Path, overrides: tuple[str, ...], name: str, extra: bool
) -> str:
    """Save the state of step 4 with one tensor more or less as step 5; return its name."""
    config = load(None, [*DRILL, *STEPS, *overrides])
    data = open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), data.tokenizer.vocab_size)
    checkpoints = Checkpointer(engine, data, RunDir(run), StepGuard(config.guard))
    assert checkpoints.resume() == 4
    state = train_state(engine) | gather_rng_state(None)
    found = next(given for given in state if name in given)
    if extra:
        state[f"{found}.more"] = torch.zeros(3)
    else:
        del state[found]
    save(
        run / "checkpoints",
        5,
        state,
        read_manifest(run / "checkpoints" / step_name(4)).extra | {"step": 5},
    )
    return found


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("name", ["model.", "optim.exp_avg_sq."])
def test_an_extra_or_missing_tensor_is_an_error(
    name: str, extra: bool, run: Path, resume: Callable[..., RankOutcome], corpus: tuple[str, ...]
) -> None:
    """No option accepts it: a partially loaded model looks trained."""
    (found,) = run_ranks(1, save_changed_state, run, corpus, name, extra)
    before = snapshot(run)
    ending = resume("checkpoint.accept_changes=[model,moe,data,train]")
    assert ending.code == CHECKPOINT
    assert (f"{found}.more" if extra else found) in ending.text
    assert snapshot(run) == before
