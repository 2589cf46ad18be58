"""Runs from Python: `dmoe.train`, `Run`, `dmoe.load`, callbacks, data and models of one's own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

import dmoe
from dmoe.distributed.full_tensors import full_state
from dmoe.distributed.mesh import build_mesh
from tests.ranks import run_ranks
from tests.tiny import tiny
from tests.train.own_network import Bigram, Log

SHORT = (
    "train.steps=4",
    "train.eval_every=2",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "train.log_every=2",
    "train.sample_tokens=0",
    "tracking.trackers=[]",
)
STEPS = ["begin", "step", "step", "save", "evaluate", "step", "step", "save", "evaluate", "end"]
TOKENS = torch.arange(32).view(2, 16)


def config(folder: Path | str, *more: str) -> dmoe.Config:
    return tiny(*SHORT, f"train.run_dir={folder}/run", *more)


def test_a_run_is_returned_with_its_numbers_and_its_model(tmp_path: Path) -> None:
    """Nothing of the process changes: handlers, accelerate's state, torch's kernels."""
    handler, shared = signal.getsignal(signal.SIGTERM), dict(AcceleratorState._shared_state)
    log = Log()
    run = dmoe.train(config(tmp_path), callbacks=[log], quiet=True)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert AcceleratorState._shared_state == shared
    assert [event for event, *_ in log.seen] == STEPS
    assert not run.stopped
    assert run.path == tmp_path / "run"
    assert [line["step"] for line in run.metrics.of("train")] == [1, 2, 4]
    logged = {line["step"]: line["loss"] for line in run.metrics.of("train")}
    seen = {step: loss for event, step, loss, *_ in filter(lambda e: e[0] == "step", log.seen)}
    assert logged == {step: seen[step] for step in logged}
    assert run.checkpoint().name == "step-00000004"
    assert run.checkpoint(2).name == "step-00000002"
    assert run.report().read_text(encoding="utf-8").startswith("<!doctype html>")
    assert dmoe.read_metrics(str(run.path)) == run.metrics
    with torch.no_grad():
        logits = run.model(TOKENS).logits
        assert torch.equal(dmoe.load(run)(TOKENS).logits, logits)
        assert torch.equal(dmoe.Run(run.path).model(TOKENS).logits, logits)
        assert not torch.equal(dmoe.load(run, 2)(TOKENS).logits, logits)
    with pytest.raises(dmoe.DmoeError, match="has no checkpoint of step 3: there are 2, 4"):
        run.checkpoint(3)
    with pytest.raises(dmoe.ConfigError, match="is not a run directory"):
        dmoe.Run(tmp_path)
    with pytest.raises(dmoe.ConfigError, match=r"moe\.top_k=9"):
        dmoe.train(config(tmp_path / "other", "moe.top_k=9"))


def test_a_file_is_trained_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    run = dmoe.train(config(tmp_path), quiet=True)
    file.write_text((run.path / "resolved.yaml").read_text().replace("steps: 4", "steps: 6"))
    longer = dmoe.train(file, quiet=True)
    assert longer.path == run.path
    assert longer.metrics.of("restart")[0]["resumed_from"] == 4
    assert longer.checkpoint().name == "step-00000006"


def test_a_table_needs_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = dmoe.train(config(tmp_path), quiet=True)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(dmoe.DmoeError, match="pip install pandas"):
        run.metrics.to_pandas()
    pandas = SimpleNamespace(json_normalize=lambda rows: len(rows))
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert run.metrics.of("eval").to_pandas() == 2


def test_texts_are_data(tmp_path: Path) -> None:
    texts = [f"text number {n} of a list " * 20 for n in range(20)]
    options = config(tmp_path, "data.holdout=0.5", "data.source=stdlib")
    run = dmoe.train(options, data=texts, quiet=True)
    assert "source: given to dmoe.train" in (run.path / "resolved.yaml").read_text()
    with pytest.raises(dmoe.DmoeError, match="its content is not what the checkpoint was trained"):
        dmoe.train(options, data=texts[1:], quiet=True)
    with pytest.raises(dmoe.ConfigError, match="data=0 texts: gives no text"):
        dmoe.train(options, data=[], quiet=True)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    options = config(tmp_path)
    model = Bigram(options)
    before = model.out.weight.detach().clone()
    run = dmoe.train(options, model=model, quiet=True)
    assert run.model is model
    assert not torch.equal(model.out.weight, before)
    with pytest.raises(dmoe.DmoeError, match=r"load it with dmoe\.load\(run, model=Bigram"):
        dmoe.load(run)
    fresh = dmoe.load(run, model=Bigram(options))
    with torch.no_grad():
        assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
    wrong: Any = torch.nn.Linear(2, 2)
    with pytest.raises(dmoe.ConfigError, match=r"model=Linear: must be a subclass of dmoe\.Model"):
        dmoe.train(config(tmp_path / "b"), model=wrong, quiet=True)
    with pytest.raises(dmoe.ConfigError, match="and the balance of the config"):
        dmoe.train(config(tmp_path / "c", "moe.balance.z=0.5"), model=Bigram(options), quiet=True)
    masked = config(tmp_path / "d", "data.document_mask=true")
    with pytest.raises(dmoe.ConfigError, match=r"reads context\.position_T, and Bigram does not"):
        dmoe.train(masked, model=Bigram(options), quiet=True)
    assert not (tmp_path / "d").exists(), "nothing is written"


def test_stops(tmp_path: Path) -> None:
    """A signal and a callback stop a run, which returns; no SystemExit."""
    for name, log in (("signal", Log(signals=2)), ("callback", Log(stops=2))):
        run = dmoe.train(config(tmp_path / name), callbacks=[log], quiet=True)
        assert run.stopped
        assert run.checkpoint().name == "step-00000002"
        assert log.seen[-1][0] == "end"
        assert not dmoe.train(config(tmp_path / name), quiet=True).stopped


def train_on_ranks(rank: int, world: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    log = Log()
    mode = ("parallel.ep=2", "parallel.mode=fsdp")
    run = dmoe.train(config(folder, *mode), callbacks=[log], quiet=True)
    assert dist.is_initialized()
    found["seen"], found["metrics"] = log.seen, len(run.metrics)
    half = dmoe.load(run, ep=2)
    expected = full_state(dmoe.load(run), build_mesh(1, torch.device("cpu")))
    with torch.no_grad():
        found["logits"] = [
            float((model(TOKENS).logits - dmoe.load(run)(TOKENS).logits).abs().max())
            for model in (run.model, half)
        ]
    found["experts"] = len(half.moe_layers()[0].experts.w_in)
    found["names"] = expected.keys() == dmoe.load(run).state_dict().keys()
    # rank 0 alone has a callback; only rank 1 asks to stop
    calls = [Log()] if rank == 0 else [Log(stops=3)]
    found["stopped"] = dmoe.train(config(f"{folder}/s"), callbacks=calls, quiet=True).stopped
    calls = [Log()] if rank == 0 else []
    dmoe.train(config(f"{folder}/alone"), callbacks=calls, quiet=True)
    errors = []
    for event in ("begin", "step", "evaluate", "save", "end"):
        calls = [Log(fails=event)] if rank == 1 else []
        with pytest.raises(dmoe.DmoeError) as caught:
            dmoe.train(config(f"{folder}/{event}"), callbacks=calls, quiet=True)
        errors.append((str(caught.value), type(caught.value.__cause__).__name__))
    found["errors"] = errors
    return found


@pytest.mark.ranks
def test_ranks(tmp_path: Path) -> None:
    """An error or a wish of a callback of one rank is that of all, and nobody waits."""
    first, second = run_ranks(2, train_on_ranks, str(tmp_path), timeout=150)
    assert first["seen"] == second["seen"]
    assert [event for event, *_ in first["seen"]] == STEPS
    assert first["metrics"] == second["metrics"] > 5
    for rank, found in enumerate((first, second)):
        assert found["stopped"]
        assert found["experts"] == 4
        assert found["names"]
        assert max(found["logits"]) < 1e-5
        for (text, cause), event in zip(
            found["errors"],
            ("train_begin", "step_end", "evaluate", "save", "train_end"),
            strict=True,
        ):
            assert text == f"callback Log.on_{event} raised ValueError on rank 1: out of budget"
            assert cause == ("ValueError" if rank == 1 else "NoneType")


def test_public_names() -> None:
    for name in dmoe.__all__:
        assert getattr(dmoe, name) is not None
    assert set(dmoe.__all__) <= set(dir(dmoe))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dmoe.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: dmoe.parallelize(3), "model=int: must be a torch.nn.Module"),
        (lambda c: dmoe.train(c, data=["text", 2]), "data=int: must be str or bytes, but text 1"),
        (lambda c: dmoe.train(c, data="text"), "data=str: must be a list of texts"),
        (lambda c: dmoe.train(c, callbacks=[3]), "callbacks=int: must be a list of dmoe.Callback"),
        (
            lambda c: dmoe.train(c, callbacks=Log()),
            "callbacks=Log: must be a list of dmoe.Callback",
        ),
        (lambda c: dmoe.load_config(None, "moe.top_k=1"), "overrides=moe.top_k=1: must be a list"),
    ],
)
def test_arguments_of_another_type_are_refused_in_one_sentence(
    call: Any, error: str, tmp_path: Path
) -> None:
    """They were a TypeError of hashlib or numpy, an AttributeError, or an error about `m`, the
    first letter; the callback was found when the run directory was written already."""
    with pytest.raises(dmoe.ConfigError, match=error):
        call(config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_texts_that_are_given_are_called_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line on the data named the default source, which was not read."""
    dmoe.train(config(tmp_path, "train.steps=1"), data=["a text of the user's " * 99], quiet=False)
    printed = capsys.readouterr().out
    assert "data: given to dmoe.train: 1 file" in printed
    assert "stdlib" not in printed
