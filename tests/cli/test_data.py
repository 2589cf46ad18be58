"""`dmoe data prepare` and `dmoe data inspect`, and training from what they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.cli.commands import SMALL, environment, run_in_process
from tests.cli.terminal import Terminal
from tests.data.conftest import text_of_file
from tests.data.test_prepare import files_of


@pytest.fixture
def books(tmp_path: Path) -> Path:
    records = [{"text": text_of_file(n, 80), "title": f"book {n}"} for n in range(60)]
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prepare_inspect_train(books: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    done = run_in_process(
        "data", "prepare", str(books), "--out", str(shards), "--workers", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "preparing " in done.stdout
    assert " MB/s" in done.stdout
    assert done.stdout.endswith(f"train with: dmoe train data.source={shards}\n")
    shown = run_in_process("data", "inspect", str(shards), "--verify", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    for words in (
        "tokenizer: bytes, vocabulary 256",
        "verified: every byte",
        "tokens per document",
    ):
        assert words in shown.stdout
    body = json.loads(run_in_process("data", "inspect", str(shards), "--json", cwd=tmp_path).stdout)
    counts = [body["splits"][name]["documents"] for name in ("train", "held_out")]
    assert sum(counts) == 60
    sample = body["splits"]["train"]["samples"][0]["text"]
    assert any(sample == text_of_file(n, 80)[: len(sample)] for n in range(60))
    run = tmp_path / "run"
    trained = run_in_process(
        "train", *SMALL, f"data.source={shards}", f"train.run_dir={run}", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    assert "documents do not see each other" in trained.stdout


def test_inspect_text_and_tokens(books: Path, tmp_path: Path) -> None:
    text = run_in_process("data", "inspect", str(books), "--label-field", "title", cwd=tmp_path)
    assert "all: 60 documents" in text.stdout, text.stderr
    assert "  book 7: 1 documents" in text.stdout
    np.frombuffer(b"\x1b[2J words\n" * 9, np.uint8).astype("<u2").tofile(tmp_path / "a.bin")
    raw = run_in_process("data", "inspect", "a.bin", cwd=tmp_path)
    assert "begin: 27 91 50 74 32" in raw.stdout, raw.stderr
    decoded = run_in_process("data", "inspect", "a.bin", "--tokenizer", "bytes", cwd=tmp_path)
    assert r"begin: \x1b[2J words\n\x1b" in decoded.stdout
    refused = run_in_process("data", "inspect", "a.bin", "--verify", cwd=tmp_path)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.txt"], "dmoe: data.source=absent.txt: "),
        (["books.jsonl", "--text-field", "body"], "dmoe: data.source=books.jsonl: line 1 has no"),
        (["books.jsonl", "--holdout", "1"], "dmoe: data.holdout=1.0: "),
        (["books.jsonl", "--tokenizer", "absent.json"], "dmoe: data.tokenizer=absent.json: "),
        (["synthetic:copy"], "dmoe: data.source=synthetic:copy: must be text to be prepared"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    books: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run_in_process(
        "data", "prepare", *arguments, "--out", "out", "--workers", "1", cwd=tmp_path
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_terminal_shows_a_bar(books: Path, tmp_path: Path) -> None:
    command = ("data", "prepare", str(books), "--out", "shards", "--workers", "1")
    with Terminal(*command, cwd=tmp_path) as terminal:
        assert terminal.finish() == 0
        raw = terminal.raw.decode()
    assert "\u2501" in raw, raw
    assert "MB/s" in terminal.text


@pytest.mark.drills
def test_killed_at_any_moment_it_goes_on(books: Path, tmp_path: Path) -> None:
    """SIGKILL, a little later each time, with two workers; the files are those of one run."""
    with books.open("a") as file:
        for n in range(60, 3000):
            file.write(json.dumps({"text": text_of_file(n, 1500)}) + "\n")
    code = (
        "import sys; from pathlib import Path; from dmoe.config.schema import DataConfig; "
        "from dmoe.data import prepare_shards; "
        "prepare_shards(DataConfig(source='books.jsonl'), Path(sys.argv[1]), 2**20, "
        "workers=int(sys.argv[2]), part_bytes=2**18)"
    )
    start = [sys.executable, "-c", code]
    subprocess.run([*start, "whole", "1"], cwd=tmp_path, env=environment(), check=True)
    expected, wait, kills = files_of(tmp_path / "whole"), 0.6, 0
    while not (tmp_path / "out" / "index.json").exists():
        process = subprocess.Popen(
            [*start, "out", "2"], cwd=tmp_path, env=environment(), start_new_session=True
        )
        try:
            assert process.wait(wait) == 0
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        wait *= 1.3
    assert kills > 1
    assert files_of(tmp_path / "out") == expected
