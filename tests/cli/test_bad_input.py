"""User errors: one line with field, value and fix, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmoe.cli import main
from tests.cli.commands import dmoe, environment, refused
from tests.config.refusals import REFUSALS

SAMPLE = (
    "moe.top_q=1",
    "mo.top_k=1",
    "moe.top_k=two",
    "moe.exchange=sideways",
    "optim.lr=.nan",
    "moe.num_experts=9 parallel.ep=2",
    "parallel.ep=4",
    "moe.top_k=9",
    "train.global_batch=9",
)
"""Rows of the table of refusals that go through the real command too."""
ARGUMENTS = {
    "no such file": (
        ["nowhere.yaml"],
        ["CONFIG=nowhere.yaml", "cannot be read", "configs/quickstart.yaml"],
    ),
    "unknown option": (["--rank", "2"], ["--rank", "dmoe train --help"]),
    "no ranks": (["--ranks", "0"], ["--ranks", "1", "dmoe train --help"]),
}
WITHOUT_TORCH = {
    "refused config": ["train", "moe.top_q=1"],
    "refused by check": ["train", "moe.top_k=9", "--ranks", "2"],
    "refused explain": ["explain", "moe.top_k=9"],
    "refused generate": ["generate", "nowhere", "--prompt", "a", "--temperature", "-1"],
    "no run": ["generate", "nowhere", "--prompt", "a"],
    "help": ["--help"],
    "fields": ["explain", "--fields"],
}


@pytest.fixture
def unused_run(place: Path) -> Iterator[Path]:
    """Run directory that must not be created."""
    path = place / "must-not-exist"
    yield path
    assert not path.exists(), "a refused run has created its directory"


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", SAMPLE)
def test_refused_configs(name: str, unused_run: Path, place: Path, small: tuple[str, ...]) -> None:
    case = REFUSALS[name]
    ranks = ["--ranks", str(case.world)] if case.world > 1 else []
    result = dmoe(
        "train", *small, f"train.run_dir={unused_run}", *case.overrides, *ranks, cwd=place
    )
    refused(result, *case.words)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refused_arguments(
    name: str, unused_run: Path, place: Path, small: tuple[str, ...]
) -> None:
    arguments, words = ARGUMENTS[name]
    overrides = (
        [f"train.run_dir={unused_run}"]
        if name == "no such file"
        else [*small, f"train.run_dir={unused_run}"]
    )
    first, last = (arguments, []) if name == "no such file" else ([], arguments)
    refused(dmoe("train", *first, *overrides, *last, cwd=place), *words)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_torch_is_not_imported_for(name: str, place: Path) -> None:
    code = "import atexit, sys; from dmoe.cli.main import run; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); run()"
    command = [sys.executable, "-c", code, *WITHOUT_TORCH[name]]
    result = subprocess.run(
        command,
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout.splitlines()[-1] == "False"
    assert result.returncode == (0 if name in ("help", "fields") else 2)


def machine_refusals(place: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return overrides and words of the refusal, for files and devices that are missing."""
    short = ["data.source=short.txt", "data.seq_len=512"]
    (place / "empty.txt").touch()
    (place / "short.txt").write_text("Just a few words in here.\n" * 3, encoding="utf-8")
    return {
        "missing corpus": (
            ["data.source=nowhere.txt"],
            ["data.source=nowhere.txt", "no such file", "check the path"],
        ),
        "empty corpus": (["data.source=empty.txt"], ["data.source=empty.txt", "at least one byte"]),
        "too short a corpus": (
            short,
            ["data.seq_len=512", "must be less than", "set data.seq_len="],
        ),
        "no CUDA": (
            ["train.device=cuda"],
            ["train.device=cuda", "no CUDA device", "train.device=cpu"],
        ),
    }


@pytest.mark.parametrize(
    "name", ["missing corpus", "empty corpus", "too short a corpus", "no CUDA"]
)
def test_configs_that_this_machine_cannot_run(
    name: str, unused_run: Path, place: Path, small: tuple[str, ...]
) -> None:
    overrides, words = machine_refusals(place)[name]
    refused(dmoe("train", *small, *overrides, f"train.run_dir={unused_run}", cwd=place), *words)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_silent_rank_leaves_rank_0_the_time_to_print(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 was the first to exit on a busy machine: the launcher ended rank 0, and nothing said
    what was wrong."""
    waits = list[float]()
    monkeypatch.setattr(main.time, "sleep", waits.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.print_error("data.source=x: is empty", 2) == 2
    assert bool(waits) == (rank == 1)
    assert capsys.readouterr().err == ("" if rank else "dmoe: data.source=x: is empty\n")


@pytest.mark.parametrize("name", ["empty corpus", pytest.param("no CUDA", marks=pytest.mark.ranks)])
def test_two_ranks_print_one_line(
    name: str, unused_run: Path, place: Path, small: tuple[str, ...]
) -> None:
    overrides, words = machine_refusals(place)[name]
    refused(
        dmoe("train", *small, *overrides, f"train.run_dir={unused_run}", "--ranks", "2", cwd=place),
        *words,
    )


@pytest.mark.parametrize(
    "ranks",
    [[], pytest.param(["--ranks", "2"], marks=pytest.mark.ranks)],
    ids=["alone", "two ranks"],
)
def test_a_run_directory_that_cannot_be_written(
    ranks: list[str], place: Path, small: tuple[str, ...]
) -> None:
    """A path below a regular file cannot be created, not even by root."""
    (place / "file").write_text("mine", encoding="utf-8")
    result = dmoe("train", *small, "train.run_dir=file/run", *ranks, cwd=place)
    refused(result, "train.run_dir=file/run", "cannot be written", "choose a directory")
    assert (place / "file").read_text(encoding="utf-8") == "mine"


def test_the_rendezvous_port_of_a_launcher_is_in_use(
    taken_port: int, unused_run: Path, place: Path, small: tuple[str, ...]
) -> None:
    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(taken_port),
    }
    result = dmoe("train", *small, f"train.run_dir={unused_run}", cwd=place, **launcher)
    refused(result, f"MASTER_PORT={taken_port}", "in use", "--master-port")


def test_the_port_of_local_ranks_is_in_use(
    taken_port: int, unused_run: Path, place: Path, small: tuple[str, ...]
) -> None:
    result = dmoe(
        "train",
        *small,
        f"train.run_dir={unused_run}",
        "--ranks",
        "2",
        "--port",
        str(taken_port),
        cwd=place,
    )
    refused(result, f"--port={taken_port}", "in use", "leave --port out")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--top-k", "0"),
        ("--top-p", "1.5"),
        ("--tokens", "0"),
        ("--seed", "-1"),
    ],
)
def test_generate_refuses_before_it_looks_for_the_run(option: str, value: str, place: Path) -> None:
    refused(
        dmoe("generate", "nowhere", "--prompt", "a", option, value, cwd=place),
        f"{option}={value}".removesuffix("-1"),
        "must",
    )


def test_generate_refuses_a_temperature_that_is_no_number(place: Path) -> None:
    result = dmoe("generate", "nowhere", "--prompt", "a", "--temperature", "nan", cwd=place)
    refused(result, "--temperature", "nan is no number in decimal notation")
