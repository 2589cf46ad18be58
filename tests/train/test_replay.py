"""Runs that record choices of experts, and runs that train with them, on other ranks and alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import dmoe
from dmoe.config.errors import ConfigError, DmoeError
from dmoe.replay import read_choices, writer
from dmoe.replay.writer import list_parts
from tests.ranks import run_ranks
from tests.tiny import tiny

BASE = (
    *("train.steps=4", "train.log_every=1", "train.sample_tokens=0", "tracking.trackers=[]"),
    *("checkpoint.every=2", "moe.balance.bias=0.01", "moe.balance.switch_level=sequence"),
    *("moe.capacity.factor=1.5", "moe.capacity.group=sequence", "alerts.drop_rate=1"),
)


def train(folder: Path, name: str, *overrides: str, **more: Any) -> list[float]:
    """Train and return the losses of all steps."""
    config = tiny(*BASE, f"train.run_dir={folder / name}", *overrides)
    run = dmoe.train(config, quiet=True, **more)
    return [line["loss"] for line in run.metrics.of("train")]


def stored(folder: Path) -> np.ndarray:
    return np.concatenate([read_choices(path) for path, _, _ in list_parts(folder)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path, _, _ in list_parts(folder)}


class Recorded(NamedTuple):
    folder: Path
    losses: list[float]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Return the losses of a run on one process, and the folder with its choices in `one`."""
    folder = tmp_path_factory.mktemp("recorded")
    return Recorded(folder, train(folder, "run", f"moe.replay.record={folder / 'one'}"))


def on_two_ranks(rank: int, world: int, folder: Path) -> list[list[float]]:
    """Record on two ranks, and replay on them what one process has recorded."""
    record, replay = f"moe.replay.record={folder / 'two'}", f"moe.replay.from={folder / 'one'}"
    again = f"moe.replay.record={folder / 'again'}"
    settings = ("parallel.ep=2", "parallel.mode=fsdp", "train.micro_batch=1")
    settings += ("train.recompute=true", "moe.exchange=padded")
    moved = f"moe.replay.from={folder / 'moved.npy'}"
    train(folder, "run moved", moved, *settings, "train.steps=1")
    return [
        train(folder, "run of two", record, "train.micro_batch=2"),
        train(folder, "run again", replay, again, *settings),
    ]


@pytest.mark.ranks
def test_choices_do_not_depend_on_who_computes_them(recorded: Recorded) -> None:
    """One process has recorded. Two ranks replay it: EP 2, accumulation, recomputation, padded.

    Two ranks that record give the files of one process, byte for byte. They compare choices of
    another program with those of all ranks.
    """
    np.save(recorded.folder / "moved.npy", np.roll(stored(recorded.folder / "one"), 1, 0))
    files = contents(recorded.folder / "one")
    assert stored(recorded.folder / "one").shape == (4 * 8 * 16, 2, 2)
    for found in run_ranks(2, on_two_ranks, recorded.folder, timeout=120):
        for losses in found:
            assert losses == pytest.approx(recorded.losses, rel=1e-5)
    for name in ("two", "again"):
        assert contents(recorded.folder / name) == files, name
    logged = (recorded.folder / "run moved" / "metrics.jsonl").read_text()
    assert logged.count("its router would have chosen") == 1


def test_a_replay_has_the_choices_of_the_recording_and_not_its_own(
    recorded: Recorded, tmp_path: Path
) -> None:
    """With another learning rate the routers choose otherwise; with given choices they do not.

    With all settings equal, the replay is the recorded run to the last bit.
    """
    given, fast = f"moe.replay.from={recorded.folder / 'one'}", "optim.lr=0.05"
    assert train(tmp_path, "same", given) == recorded.losses
    own = train(tmp_path, "own", fast, f"moe.replay.record={tmp_path / 'b'}")
    replayed = train(tmp_path, "given", fast, given, f"moe.replay.record={tmp_path / 'c'}")
    first, others = stored(recorded.folder / "one"), stored(tmp_path / "b")
    again = stored(tmp_path / "c")
    assert (first != others).mean() > 0.05
    assert np.array_equal(first, again)
    assert replayed != own


class Crash(dmoe.Callback):
    def on_step_end(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step == 3:
            raise RuntimeError("the machine is gone")


@pytest.mark.parametrize(("part_bytes", "ends"), [(1, [1, 2, 3]), (writer.PART_BYTES, [2])])
def test_a_run_that_crashed_records_on(
    part_bytes: int,
    ends: list[int],
    recorded: Recorded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Small parts: one per step, one behind the checkpoint of step 2 among them.

    Else the one that was written because a checkpoint was due.
    """
    monkeypatch.setattr(writer, "PART_BYTES", part_bytes)
    record = f"moe.replay.record={tmp_path / 'choices'}"
    with pytest.raises(DmoeError, match="the machine is gone"):
        train(tmp_path, "broken", record, callbacks=[Crash()])
    assert [end for _, _, end in list_parts(tmp_path / "choices")] == ends
    assert len(train(tmp_path, "broken", record)) == 4
    assert np.array_equal(stored(tmp_path / "choices"), stored(recorded.folder / "one"))


def test_choices_of_other_programs(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain array [tokens, layers, K] is trained with; what it cannot say is said."""
    given = (stored(recorded.folder / "one") + 1) % 8
    np.save(tmp_path / "x.npy", given)
    paths = f"moe.replay.from={tmp_path / 'x.npy'}", f"moe.replay.record={tmp_path / 'b'}"
    train(tmp_path, "two", *paths)
    assert np.array_equal(stored(tmp_path / "b"), given)
    assert "does not say which tokens it belongs to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "layer"),
    [("none", None), ("layers swapped", 0), ("one layer", 1), ("tokens moved", 0)],
)
def test_choices_that_are_not_those_of_the_tokens_are_an_alert(
    change: str,
    layer: int | None,
    recorded: Recorded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of an engine whose layers were swapped trained in silence, with experts of no token.

    The own choices of the same run, without the header, are no reason for an alert. Nor does the
    comparison change a number.
    """
    given = stored(recorded.folder / "one")
    if change == "layers swapped":
        given = given[:, ::-1]
    elif change == "one layer":
        given = np.stack([given[:, 0], (given[:, 1] + 4) % 8], 1)
    elif change == "tokens moved":
        given = np.roll(given, 1, 0)
    np.save(tmp_path / "x.npy", given)
    losses = train(tmp_path, "run", f"moe.replay.from={tmp_path / 'x.npy'}")
    said = capsys.readouterr().out
    if layer is None:
        assert losses == recorded.losses
    assert said.count("alert: of the experts that moe.replay.from gives") == (layer is not None)
    if layer is not None:
        assert f"in MoE layer {layer}, its router would have chosen" in said
        assert "itself, and 25% is chance" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.temperature=3"], "was recorded with data of fingerprint"),
        (["train.steps=5"], "holds no choices of step 5, and the run has 5; use train.steps=4"),
        (["train.seed=1"], "was recorded with train.seed 0, and this run has 1"),
        (["moe.num_experts=4"], "has 8 experts, and this run 4"),
        (["moe.replay.from=nothing.npy"], "nothing.npy"),
    ],
)
def test_refused_choices_leave_no_run_directory(
    overrides: list[str], words: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """What can be seen without a read of the ids is refused before anything is written.

    The run directory was made first: it stayed behind, and the next try went on in it.
    """
    shared = tmp_path_factory.getbasetemp() / "recorded"
    texts = [f"{n} times {m} is {n * m}\n" * 20 for n in range(9) for m in range(9)]
    if not shared.exists():
        train(shared, "run", f"moe.replay.record={shared / 'choices'}", data=texts)
    given = f"moe.replay.from={shared / 'choices'}"
    with pytest.raises(ConfigError) as refusal:
        train(tmp_path, "run", given, *overrides, data=texts)
    assert words in str(refusal.value)
    assert not (tmp_path / "run").exists(), "a refused run left a lock, checkpoints and attempts"
