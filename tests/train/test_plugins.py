"""A run with code of the user's own: trained on two ranks, resumed, described, and kept from strangers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmoe.checkpoint.manifest import read
from dmoe.config.load import load
from dmoe.config.plugin_loader import load_plugins
from dmoe.distributed.init import ProcessInfo
from dmoe.explain import explain
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from dmoe.train.run_session import RunSession
from tests.cli.commands import SMALL, dmoe, run_in_process

EXAMPLE = Path(__file__).parents[2] / "examples" / "nearest_router.py"
KINDS = Path(__file__).parents[1] / "own_kinds.py"


@pytest.mark.ranks
def test_a_router_of_ones_own_trains_resumes_and_is_refused_once_its_file_has_changed(
    tmp_path: Path,
) -> None:
    """About 40 s: two ranks, then one process, from two working directories."""
    (tmp_path / "elsewhere").mkdir()
    code = tmp_path / "my_router.py"
    code.write_bytes(EXAMPLE.read_bytes())
    own = [
        "moe.router.options.power=2",
        *(f"data.source={KINDS}:Squares", f"data.tokenizer={KINDS}:Nibbles", "data.holdout=0.2"),
        *(f"optim.kind={KINDS}:Lion", "optim.lr=0.001", f"optim.schedule={KINDS}:Sawtooth"),
        *(f"moe.experts.kind={KINDS}:Squared", f"moe.balance.kind={KINDS}:Entropy"),
        *("moe.balance.own=0.01", "train.sample_prompt=1", f"train.run_dir={tmp_path / 'run'}"),
    ]
    first = dmoe(
        *("train", "--ranks", "2", *SMALL, *own, "moe.router.kind=./my_router.py:Nearest"),
        cwd=tmp_path,
    )
    assert first.returncode == 0, first.stderr[-3000:]
    assert "code: moe.router.kind=my_router.py:Nearest of your own (sha256" in first.stdout
    run = RunDir(tmp_path / "run")
    recorded = load(run.path / "resolved.yaml")
    assert recorded.moe.router.options == {"power": 2}
    (newest,) = run.checkpoints.glob("step-*6")
    saved = read(newest).extra["config"]["moe"]["router"]
    assert saved["kind"] == recorded.moe.router.kind
    assert saved["kind"].startswith(f"{code}:Nearest@")
    assert "Router: my_router.py:Nearest of your own (sha256" in _text(run.path / "report.html")

    refused = run_in_process("generate", str(run.path), "--prompt", "1", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--trust-code" in refused.stderr

    going_on = ["train", "--resume", str(run.path), "train.steps=8"]
    refused = run_in_process(*going_on, cwd=tmp_path)
    assert (refused.returncode, "--trust-code" in refused.stderr) == (2, True), refused.stderr
    resumed = run_in_process(*going_on, "--trust-code", cwd=tmp_path / "elsewhere")
    assert (resumed.returncode, resumed.stderr) == (0, ""), resumed.stderr
    assert "resumed after step 6" in resumed.stdout
    assert restore_model(run, trust_code=True).model.moe_layers()[0].router.power == 2
    trusted = run_in_process(
        "generate", str(run.path), "--prompt", "1", "--tokens", "3", "--trust-code", cwd=tmp_path
    )
    assert (trusted.returncode, trusted.stdout[0]) == (0, "1"), trusted.stderr

    code.write_text(code.read_text() + "# one more line\n")
    again = ["train", *SMALL, *own, "moe.router.kind=./my_router.py:Nearest", "train.steps=9"]
    changed = run_in_process(*again, cwd=tmp_path)
    assert changed.returncode == 3
    assert "moe.router.kind=my_router.py:Nearest: its file has changed" in changed.stderr
    moved = tmp_path / "elsewhere" / "my_router.py"
    moved.write_bytes(EXAMPLE.read_bytes())
    assert run_in_process(*again, cwd=moved.parent).returncode == 0, "the same file elsewhere"
    accepted = "checkpoint.accept_changes=[moe.router.kind]"
    result = run_in_process(*again[:-1], "train.steps=10", accepted, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def _text(path: Path) -> str:
    return (
        path.read_text(encoding="utf-8")
        .replace("&#x27;", "'")
        .replace("<strong>", "")
        .replace("</strong>", "")
    )


def test_explain_names_what_is_of_ones_own() -> None:
    own = [
        f"moe.router.kind={EXAMPLE}:Nearest",
        *(f"optim.kind={KINDS}:Lion", f"optim.schedule={KINDS}:Sawtooth"),
        *(f"moe.experts.kind={KINDS}:Squared", "moe.experts.options.power=3"),
        *(f"moe.balance.kind={KINDS}:Entropy", "moe.balance.own=0.01"),
    ]
    config = load_plugins(load(None, [*SMALL, *own, "data.source=synthetic:zipf"]))
    sections = {section.key: section for section in explain(config, 1)}
    text = " ".join(sentence for s in sections.values() for sentence in s.sentences)
    for name in ("nearest_router.py:Nearest", *(f"own_kinds.py:{k}" for k in ("Lion", "Squared"))):
        assert f"{name} of your own (sha256" in text, name
    assert "Learning rate: by own_kinds.py:Sawtooth of your own" in text
    assert "Auxiliary loss own x 0.01: own_kinds.py:Entropy of your own" in text
    size = sections["size"].numbers["rank_bytes"]
    assert size["moments"] == size["gradients"], "Lion has one moment"


def test_a_router_without_weights_says_what_it_is() -> None:
    config = load_plugins(
        load(None, [*SMALL, f"moe.router.kind={KINDS}:Position", "data.source=synthetic:zipf"])
    )
    (routing,) = [s for s in explain(config, 1) if s.key == "routing"]
    assert "the experts of the token's place in its sequence" in " ".join(routing.sentences)


def test_the_command_that_goes_on_trusts_the_code_that_was_given_once(tmp_path: Path) -> None:
    session = RunSession(RunDir(tmp_path), ProcessInfo(0, 2, 0, torch.device("cpu")), None)
    own = load(None, [f"moe.router.kind={EXAMPLE}:Nearest"])
    assert session.resume_command(own).endswith("--ranks 2 --trust-code")
    assert session.resume_command(load(None, [])).endswith("--ranks 2")
