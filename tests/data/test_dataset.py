from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data


@pytest.fixture
def config(texts: Path) -> DataConfig:
    return DataConfig(source=str(texts), seq_len=16, holdout=0.2)


def test_the_default_corpus_opens() -> None:
    data = open_data(DataConfig(), 0)
    assert data.train.num_sequences is not None
    assert data.held_out.num_sequences is not None
    assert data.train.num_sequences > 20_000
    assert 0.01 < data.held_out.num_sequences / data.train.num_sequences < 0.15
    line = data.describe()
    assert "\n" not in line
    assert "stdlib:" in line
    assert data.fingerprint[:12] in line
    token_BS = data.train.batch(0, 0, 24, 24)
    assert token_BS.shape == (24, 129)
    assert token_BS.max() < data.tokenizer.vocab_size


def test_opening_needs_no_torch() -> None:
    script = "import sys, dmoe.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_text_comes_back_in_stored_order(config: DataConfig, texts: Path) -> None:
    data = open_data(config, 0)
    assert data.held_out.num_sequences is not None
    row_BS = data.held_out.samples(0, data.held_out.num_sequences)
    text = data.tokenizer.decode(row_BS[:, 1:].ravel())
    held_out = [
        path.read_text() for path in sorted(texts.rglob("*.txt")) if path.read_text() in text
    ]
    assert 3 < len(held_out) < 30
    assert "".join(held_out).startswith(text[: len("".join(held_out))])


def test_a_single_text_file_simply_works(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("In the beginning was the word. " * 200)
    data = open_data(DataConfig(source=str(path), seq_len=32), 0)
    assert data.train.num_sequences == (5890 + 2 - 1) // 32
    assert data.held_out.num_sequences == (310 + 2 - 1) // 32
    assert "its last 5.00% held out" in data.describe()


def test_the_fingerprint_is_of_what_is_trained_on(
    config: DataConfig, texts: Path, rank_file: Path
) -> None:
    base = open_data(config, 0).fingerprint
    assert open_data(config, 1).fingerprint == base, (
        "the seed orders the data, it does not change it"
    )
    changed = [
        replace(config, seq_len=17),
        replace(config, holdout=0.2 + 1e-12),
        replace(config, tokenizer=str(rank_file)),
        replace(config, tokenizer=str(rank_file), tokenizer_vocab=256),
    ]
    assert len({base, *(open_data(c, 0).fingerprint for c in changed)}) == 5
    (texts / "even" / "00.txt").write_text("another text")
    assert open_data(config, 0).fingerprint != base


def test_seeds_change_the_order(config: DataConfig) -> None:
    first, second = (open_data(config, seed).train.batch(0, 0, 8, 8) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_what_encoding_changes_is_said(tmp_path: Path, rank_file: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"caf\xe9 and words without it " * 300 + b"\0 " * 50 + b"tail of words" * 300
    )
    config = DataConfig(source=str(tmp_path / "a.txt"), seq_len=16)
    data = open_data(config, 0)
    assert "NUL bytes removed (50)" in data.describe()
    assert 0xE9 in data.train.samples(0, 1), "the byte tokenizer keeps bytes as they are"
    described = open_data(replace(config, tokenizer=str(rank_file)), 0)
    assert "hold U+FFFD (1)" in described.describe(), "the halves of the cut file are one"
    assert "caf\ufffd" in described.tokenizer.decode(described.train.samples(0, 1)[0])


@pytest.mark.parametrize("seq_len", [0, -4])
def test_seq_len_must_be_positive(config: DataConfig, seq_len: int) -> None:
    with pytest.raises(ConfigError, match=rf"data.seq_len={seq_len}: must be at least 1"):
        open_data(replace(config, seq_len=seq_len), 0)


def test_a_held_out_split_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    with pytest.raises(
        ConfigError, match=r"data.seq_len=64: must be less than the 27 tokens of the held_out split"
    ):
        open_data(DataConfig(source=str(tmp_path / "a.txt"), seq_len=64), 0)
