"""Fault 29: a run is taken up with another config. What only says how fast or how often may change; what means another run may not,
unless one says so; and what does not fit the tensors may not at all."""

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
from dmoe.train.checkpointer import Checkpointer, training_state
from dmoe.train.step_guard import StepGuard
from tests.drills.jobs import DRILL
from tests.drills.two_ranks import STEPS, trained
from tests.drills.worker import Ending, run_ranks, train_inside

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
    """As it was after step 4."""
    run = shutil.copytree(original, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / step_name(8))
    return run


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the bytes in another order: as many tokens, which mean something else."""
    path = tmp_path_factory.mktemp("tokenizer") / "other.tiktoken"
    lines = [f"{base64.b64encode(bytes([255 - byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def taken_up(run: Path, corpus: tuple[str, ...]) -> Callable[..., Ending]:
    """Train on with these overrides beside the original ones."""
    return lambda *overrides: run_ranks(1, train_inside, run, (*STEPS, *corpus, *overrides))[0]


def untouched(run: Path) -> dict[str, bytes]:
    """What a refusal must leave as it is."""
    kept = ("resolved.yaml", "config.yaml", "metrics.jsonl")
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


def test_what_does_not_change_the_run_may_change(
    run: Path, taken_up: Callable[..., Ending]
) -> None:
    """Learning rate and schedule too: changing them in the middle is what people do."""
    assert taken_up(*NEUTRAL) == Ending(0, "")
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
"""Fields that mean another run, and their new values."""
MISFITS = {"moe.num_experts": ".experts.", "moe.router.kind": ".router.", "model.dim": "model."}
"""Those that nobody can accept, and the tensor that says so."""


@pytest.mark.parametrize("name", CHANGED)
def test_what_means_another_run_is_refused_by_name_until_it_is_accepted(
    name: str, run: Path, taken_up: Callable[..., Ending]
) -> None:
    change, before = f"{name}={CHANGED[name]}", untouched(run)
    refused = taken_up(change)
    assert refused.code == CHECKPOINT
    assert refused.text.startswith(f"{change}: the checkpoint was trained with ")
    assert refused.text.endswith(f"checkpoint.accept_changes=[{name}]")
    assert untouched(run) == before
    accepted = taken_up(change, f"checkpoint.accept_changes=[{name}]")
    if name in MISFITS:
        assert accepted.code == CHECKPOINT
        assert MISFITS[name] in accepted.text
        assert untouched(run) == before
    else:
        assert accepted == Ending(0, "")
        assert max(line["step"] for line in read_metrics(run / "metrics.jsonl")) == 8


def test_another_corpus_and_another_tokenizer(
    run: Path, taken_up: Callable[..., Ending], tmp_path: Path, ranks_file: Path
) -> None:
    """Two changes: to accept one is not to accept the other, and the line that is suggested holds both."""
    other, tokenizer = text(tmp_path / "other.txt", 1), f"data.tokenizer={ranks_file}"
    assert taken_up(other).text.endswith("checkpoint.accept_changes=[data.source]")
    assert taken_up(tokenizer).text.endswith("checkpoint.accept_changes=[data.tokenizer]")
    both = taken_up(other, tokenizer, "checkpoint.accept_changes=[data.source]")
    assert both.code == CHECKPOINT
    assert both.text.startswith(f"{tokenizer}: the checkpoint was trained with bytes")
    assert both.text.endswith("checkpoint.accept_changes=[data.source,data.tokenizer]")
    assert taken_up(other, "checkpoint.accept_changes=[data.source]") == Ending(0, "")


def test_a_corpus_whose_content_has_changed_under_its_name(
    run: Path, taken_up: Callable[..., Ending], corpus: tuple[str, ...]
) -> None:
    path = Path(corpus[0].removeprefix("data.source="))
    content = path.read_bytes()
    try:
        path.write_bytes(content.replace(b"a", b"b"))
        refused = taken_up()
        assert refused.code == CHECKPOINT
        assert refused.text.startswith(
            f"{corpus[0]}: its content is not what the checkpoint was trained on"
        )
        assert taken_up("checkpoint.accept_changes=[data]") == Ending(0, "")
    finally:
        path.write_bytes(content)


def rewritten(
    rank: int, world: int, run: Path, overrides: tuple[str, ...], name: str, extra: bool
) -> str:
    """The state of step 4 with one tensor more or less, whole and well hashed, as step 5; the tensor's name."""
    config = load(None, [*DRILL, *STEPS, *overrides])
    data = open_data(config.data, config.train.seed)
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), data.tokenizer.vocab_size)
    checkpoints = Checkpointer(engine, data, RunDir(run), StepGuard(config.guard))
    assert checkpoints.resume() == 4
    state = training_state(engine) | gather_rng_state(None)
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
def test_a_tensor_more_or_less_is_an_error(
    name: str, extra: bool, run: Path, taken_up: Callable[..., Ending], corpus: tuple[str, ...]
) -> None:
    """No flag accepts it: a model that was half loaded looks trained."""
    (found,) = run_ranks(1, rewritten, run, corpus, name, extra)
    before = untouched(run)
    ending = taken_up("checkpoint.accept_changes=[model,moe,data,train]")
    assert ending.code == CHECKPOINT
    assert (f"{found}.more" if extra else found) in ending.text
    assert untouched(run) == before
