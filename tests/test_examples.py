"""The examples run as they are written, with the numbers of one process, and are typed."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parent.parent
OWN_LOOP = ROOT / "examples" / "own_loop.py"
MODES = ("ddp", "fsdp", "none")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_own_loop(rank: int, world: int, folder: str, ports: list[int]) -> None:
    """Start the example as torchrun would, once for each mode."""
    for mode, port in zip(MODES, ports, strict=True):
        dist.destroy_process_group()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        sys.argv = [str(OWN_LOOP), f"{folder}/{mode}.safetensors", mode]
        runpy.run_path(str(OWN_LOOP), run_name="__main__")


def difference(found: Path, expected: Path) -> float:
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    return max(
        float((torch.as_tensor(ours[k]) - torch.as_tensor(v)).abs().max())
        for k, v in theirs.items()
    )


def test_own_loop_has_the_numbers_of_one_process(tmp_path: Path) -> None:
    """Weights, balance biases and the gradient norm, after four steps of plain descent."""
    lines = OWN_LOOP.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    imports = [line for line in lines if line.startswith(("import dmoe", "from dmoe"))]
    assert imports == ["import dmoe"]
    one = tmp_path / "one.safetensors"
    subprocess.run([sys.executable, str(OWN_LOOP), str(one)], check=True, cwd=ROOT)
    run_ranks(2, run_own_loop, str(tmp_path), free_ports(3))
    assert load_file(one)["moes.0.router.bias_E"].abs().max() > 0
    for mode in MODES:
        assert difference(tmp_path / f"{mode}.safetensors", one) < 1e-6, mode
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", str(OWN_LOOP)]
    subprocess.run([*command, str(tmp_path / "two.safetensors")], check=True, capture_output=True)
    assert difference(tmp_path / "two.safetensors", one) < 1e-6


def test_train_from_python(tmp_path: Path) -> None:
    script = ROOT / "examples" / "train_from_python.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert "stopped early: True" in done.stdout, done.stdout


def test_replay_of_the_choices_of_an_inference_engine(tmp_path: Path) -> None:
    script = ROOT / "examples" / "replay.py"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "with moe.replay.from all are the engine's: True" in done.stdout, done.stdout
    share = re.search(r"engine's for ([\d.]+)% of the tokens", done.stdout)
    assert share is not None
    assert 0.1 < float(share[1]) < 50, "bfloat16 chooses otherwise for a few percent"


def test_own_data(tmp_path: Path) -> None:
    """Ten books of JSON Lines to a report, in five commands; only the model is smaller here."""
    script = ROOT / "examples" / "own_data.sh"
    commands = [line for line in script.read_text().splitlines() if line.startswith("dmoe ")]
    assert len(commands) == 5
    small = "model.dim=32 model.layers=1 data.seq_len=32 train.global_batch=4"
    paths = (str(Path(sys.executable).parent), os.environ["PATH"])
    done = subprocess.run(
        ["bash", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ
        | {
            "PATH": os.pathsep.join(paths),
            "PYTHONPATH": str(ROOT),
            "STEPS": "3",
            "MORE": f"{small} train.eval_sequences=20",
        },
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    for words in ("all: 10 documents", "prepared ", "verified: ", "html: 1 documents", "sample:"):
        assert words in done.stdout, done.stdout


def test_the_examples_are_typed() -> None:
    """As a user's own code would be, strictly: `mypy` reads them with these settings."""
    assert (ROOT / "dmoe" / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert "examples" in settings["files"]
    strict = [entry["module"] for entry in settings["overrides"] if entry.get("strict")]
    assert {"own_loop", "train_from_python"} <= set(*strict)
    assert "\nmypy\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
