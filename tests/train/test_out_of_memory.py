"""Memory that runs out anywhere in a run ends it with one sentence, on CPU and on CUDA."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch

from dmoe.data import dataset
from dmoe.train import engine, trainer
from tests.cli.commands import SMALL, dmoe, refused, run_in_process
from tests.config.test_memory import CUDA

WHAT = "2.00 GiB more were needed, and GPU 3 has 512.00 MiB free of 79.10 GiB"


def out_of_memory(*_: object, **__: object) -> None:
    raise CUDA


@pytest.mark.parametrize(
    ("place", "name", "field"),
    [
        (dataset, "_open_synthetic", "data.source=synthetic:zipf"),
        (engine, "_build_model", "moe.num_experts="),
        (engine, "_warm_up", "train.global_batch=8"),
        (trainer, "compute_gradients", "train.global_batch=8"),
        (trainer, "evaluate", "train.global_batch=8"),
    ],
)
def test_every_part_of_a_run_names_its_field(
    place: object, name: str, field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a traceback of 30 lines, on CUDA too (raised here as torch raises it)."""
    monkeypatch.setattr(place, name, out_of_memory)
    run = run_in_process("train", *SMALL, "data.source=synthetic:zipf", cwd=tmp_path)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"dmoe: {field}")
    assert f": out of memory: {WHAT}; " in line


def test_a_real_allocation_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only an error that a test made: more main memory than any machine has."""
    monkeypatch.setattr(engine, "_warm_up", lambda engine: torch.empty(1 << 50))
    run = run_in_process("train", *SMALL, "data.source=synthetic:zipf", cwd=tmp_path)
    refused(
        subprocess.CompletedProcess([], run.returncode, "", run.stderr),
        "train.global_batch=8: out of memory: 4,194,304 GiB more were needed, and there is ",
        " of main memory; use train.micro_batch=4 or less",
    )


def test_other_commands_have_the_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmoe.explain.resolve", out_of_memory)
    run = run_in_process("explain", *SMALL, cwd=tmp_path)
    refused(run, f"out of memory: {WHAT}; lower train.global_batch", code=1)


def test_the_command_that_was_reported(tmp_path: Path) -> None:
    refused(dmoe("train", "train.global_batch=1000000", "train.device=cpu", cwd=tmp_path), "GiB")
    assert not (tmp_path / "runs").exists()


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "cause"), [("SIGKILL", "the kernel does so when "), ("SIGSEGV", "a library has crash")]
)
def test_a_rank_that_is_killed_is_named(name: str, cause: str, tmp_path: Path) -> None:
    """The launcher returned 137 or 139 without a word: out of main memory, or a crash in torch."""
    fault = tmp_path / "sitecustomize.py"
    fault.write_text(
        "import os, signal\n"
        "if os.environ.get('LOCAL_RANK') == '1':\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
    )
    run = dmoe("train", "--ranks", "2", *SMALL, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert run.returncode == 128 + signal.Signals[name]
    assert f"dmoe: rank 1 was killed ({name}); {cause}" in run.stderr
