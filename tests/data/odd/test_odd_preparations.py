"""Preparations of sources that change, or that contain the shards themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data import open_data
from dmoe.data.prepare import Progress, documents, prepare_shards
from dmoe.data.prepare import source as source_module
from dmoe.data.prepare.inspect import inspect_data
from dmoe.data.sources import read_corpus


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(parts: int) -> object:
    def stop(progress: Progress) -> None:
        if progress.parts >= parts:
            raise Stopped

    return stop


def write_books(folder: Path, count: int = 60) -> DataConfig:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:03d}.txt").write_text(f"book {number} says nothing. " * 40)
    return DataConfig(source=str(folder), seq_len=16, holdout=0.2)


def prepare(config: DataConfig, out: Path, **more: object) -> Path:
    options = {"shard_tokens": 4000, "part_bytes": 4000, "piece_bytes": 504} | more
    prepare_shards(config, out, **options)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("pattern", ["", "**/*"])
def test_shards_below_their_own_source_are_not_read(tmp_path: Path, pattern: str) -> None:
    """With --out inside SOURCE, the second pass found `plan.json` of the preparation itself.

    It became a document of the training split, without a word; a resumed preparation and, for a
    glob, a later run on the text read it (and index.json) too.
    """
    config = write_books(tmp_path / "books")
    if pattern:
        config = replace(config, source=f"{config.source}/{pattern}")
    text = open_data(config, 0)
    out = tmp_path / "books" / "shards"
    with pytest.raises(Stopped):
        prepare(config, out, on_progress=stop_after(3))
    assert len(read_corpus(config.source).documents) == 60
    prepare(config, out)
    shards = open_data(DataConfig(str(out), seq_len=16, document_mask=False), 0)
    assert shards.fingerprint == text.fingerprint == open_data(config, 0).fingerprint
    assert "directories of shards (" in shards.summary


def test_an_unfinished_preparation_is_no_text(tmp_path: Path) -> None:
    """`dmoe data inspect` and `prepare` of an interrupted directory showed `plan.json` as text."""
    config = write_books(tmp_path / "books")
    with pytest.raises(Stopped):
        prepare(config, tmp_path / "out", on_progress=stop_after(3))
    unfinished = DataConfig(source=str(tmp_path / "out"), seq_len=16)
    for read in (
        lambda: inspect_data(unfinished, None, 2),
        lambda: prepare(unfinished, tmp_path / "again"),
        lambda: open_data(unfinished, 0),
    ):
        with pytest.raises(ConfigError, match="is unfinished"):
            read()
    assert not (tmp_path / "again").exists()


def test_a_large_file_that_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is hashed first and encoded later; one rewritten meanwhile was in the shards
    half as it was and half as it is, under the hash of what it was."""
    monkeypatch.setattr(source_module, "SMALL", 1000)
    monkeypatch.setattr(documents, "BLOCK", 500)
    config = write_books(tmp_path / "books", 2)
    large = tmp_path / "books" / "001.txt"
    large.write_text("old " * 5000)

    def rewrite(progress: Progress) -> None:
        if progress.parts == 2:
            large.write_text("new " * 5000)

    with pytest.raises(ConfigError, match=r"001\.txt: has changed while it was read"):
        prepare(config, tmp_path / "out", on_progress=rewrite)
    with pytest.raises(ConfigError, match="unfinished preparation of other text"):
        prepare(config, tmp_path / "out")


def test_a_source_that_lost_its_last_files_is_refused(tmp_path: Path) -> None:
    """The parts of the files that are left agree with those of the interrupted run. So shards with
    the text of the removed files were taken over, and their index said nothing of it."""
    config = write_books(tmp_path / "books", 80)
    with pytest.raises(Stopped):
        prepare(config, tmp_path / "out", part_bytes=1, on_progress=stop_after(79))
    for number in range(70, 80):
        (tmp_path / "books" / f"{number:03d}.txt").unlink()
    with pytest.raises(ConfigError, match="unfinished preparation of other text"):
        prepare(config, tmp_path / "out", part_bytes=1)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_path_that_cannot_be_made_asks_for_no_room(tmp_path: Path) -> None:
    """The advice for a file in the way was to make room."""
    config = write_books(tmp_path / "books")
    with pytest.raises(ConfigError, match=r"\(Not a directory\); check the path"):
        prepare(config, tmp_path / "books" / "000.txt" / "shards")
